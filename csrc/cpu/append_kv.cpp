#include "append_kv.h"

#include <algorithm>

#include "parallel.h"
#include "simd.h"

namespace longvita::LV_ISA {
namespace {

// Nearest e4m3 (even on ties) of |x| <= 448: 4 exponent bits with bias 7, 3 mantissa bits, subnormals in steps of 2^-9.
uint8_t to_e4m3(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint8_t sign = uint8_t((bits >> 24) & 0x80);
  bits &= 0x7fffffffu;
  float magnitude;
  std::memcpy(&magnitude, &bits, 4);
  if (magnitude < 0x1p-6f) return uint8_t(sign | uint8_t(std::nearbyint(magnitude * 0x1p9f)));
  bits += 0x7ffffu + ((bits >> 20) & 1);
  return uint8_t(sign | uint8_t((bits >> 20) - (120u << 3)));
}

template <class T>
float largest(const T* x, int64_t dim) {
  vf m = {};
  for (int64_t d = 0; d < dim; d += W) m = vmax(vabs(load_n(x + d, int(std::min<int64_t>(W, dim - d)))), m);
  return hmax(m);
}

// One symmetric scale per token and head: the largest magnitude maps to the largest code. A row of zeros has scale 0 and codes 0.
template <class T, class Code, class Convert>
void quantise(const T* x, int64_t dim, float top, Code* out, float& scale, Convert convert) {
  scale = largest(x, dim) / top;
  const float divisor = scale > 0.0f ? scale : 1.0f;
  float values[W];
  for (int64_t d = 0; d < dim; d += W) {
    const int n = int(std::min<int64_t>(W, dim - d));
    store(values, load_n(x + d, n) / divisor);
    for (int i = 0; i < n; ++i) {      // NaN becomes the lower bound: a defined code
      const float bounded = values[i] > -top ? (values[i] < top ? values[i] : top) : -top;
      out[d + i] = convert(bounded);
    }
  }
}

template <class T, class C>
void copy(const T* x, int64_t dim, C* out) {
  for (int64_t d = 0; d < dim; d += W) {
    const int n = int(std::min<int64_t>(W, dim - d));
    store_n(out + d, load_n(x + d, n), n);
  }
}

template <class T>
void write(const T* x, const KvCache& cache, const CacheSide& side, int64_t row, int64_t column, int64_t head) {
  const int64_t at = side.at(row, column, head);
  switch (cache.dtype) {
    case DType::f32: return copy(x, cache.dim, reinterpret_cast<float*>(side.data) + at);
    case DType::bf16: return copy(x, cache.dim, reinterpret_cast<bf16_t*>(side.data) + at);
    case DType::f16: return copy(x, cache.dim, reinterpret_cast<f16_t*>(side.data) + at);
    case DType::i8:
      return quantise(x, cache.dim, 127.0f, reinterpret_cast<int8_t*>(side.data) + at, side.scale_at(row, column, head),
                      [](float v) { return int8_t(std::nearbyint(v)); });
    default:
      return quantise(x, cache.dim, 448.0f, reinterpret_cast<uint8_t*>(side.data) + at, side.scale_at(row, column, head), to_e4m3);
  }
}

template <class T>
void append_rows(const AppendArgs& args) {
  const Sequences& s = args.sequences;
  const T *k = reinterpret_cast<const T*>(args.k.data), *v = reinterpret_cast<const T*>(args.v.data);
  parallel_steps(args.k.tokens, args.threads, args.k.tokens * args.cache.heads * args.cache.dim > kWorthElements, [&](int64_t t) {
    const int64_t b = std::upper_bound(s.offsets, s.offsets + s.batch + 1, int32_t(t)) - s.offsets - 1;
    const int64_t position = s.lengths[b] + (t - s.offsets[b]);
    const int64_t row = args.cache.row(b, position), column = args.cache.column(position);
    for (int64_t h = 0; h < args.cache.heads; ++h) {
      write(k + t * args.k.stride_token + h * args.k.stride_head, args.cache, args.cache.k, row, column, h);
      write(v + t * args.v.stride_token + h * args.v.stride_head, args.cache, args.cache.v, row, column, h);
    }
  });
}

void append(const AppendArgs& args) {
  if (args.dtype == DType::f32) append_rows<float>(args);
  else if (args.dtype == DType::bf16) append_rows<bf16_t>(args);
  else append_rows<f16_t>(args);
}

}  // namespace

extern const AppendKernels append_kernels = {&append};

}  // namespace longvita::LV_ISA
