#include "merge_attention.h"

#include "parallel.h"
#include "simd.h"

namespace longvita::LV_ISA {
namespace {

// Shares of the two parts, whether they saw a key (else they are not read: memory that nobody has written may hold NaN), the merged lse.
struct Weights {
  float a, b, lse;
  bool sees_a, sees_b;
};

// Both −inf: shares 0, so that the result and every gradient are 0.
Weights weights(float lse_a, float lse_b) {
  const bool a_larger = lse_a >= lse_b;
  const float larger = a_larger ? lse_a : lse_b, smaller = a_larger ? lse_b : lse_a;
  if (larger == -kInf) return {0.0f, 0.0f, -kInf, false, false};
  const float e = std::exp(smaller - larger);
  const float w_large = 1.0f / (1.0f + e), w_small = e / (1.0f + e);
  return {a_larger ? w_large : w_small, a_larger ? w_small : w_large, larger + std::log1p(e), lse_a != -kInf, lse_b != -kInf};
}

template <class T>
T* row(const Rows3& x, int64_t token, int64_t head) {
  return x.data == nullptr ? nullptr : reinterpret_cast<T*>(x.data) + token * x.stride_token + head * x.stride_head;
}

template <class T, class Body>
void each_row(const MergeArgs& args, int threads, Body body) {
  const int64_t rows = args.tokens * args.heads;
  parallel_steps(rows, threads, rows * args.dim > kWorthElements, [&](int64_t i) {
    const int64_t token = i / args.heads, head = i % args.heads;
    body(token, head, weights(args.lse_a.at(token, head), args.lse_b.at(token, head)));
  });
}

template <class T>
void scale_row(T* out, const T* x, float factor, int64_t dim) {
  if (out == nullptr) return;
  for (int64_t d = 0; d < dim; d += W) {
    const int n = dim - d < W ? int(dim - d) : W;
    store_n(out + d, x == nullptr ? vf{} : load_n(x + d, n) * factor, n);
  }
}

template <class T>
void forward_rows(const MergeArgs& args, int threads) {
  each_row<T>(args, threads, [&](int64_t token, int64_t head, Weights w) {
    const T *a = row<T>(args.out_a, token, head), *b = row<T>(args.out_b, token, head);
    T* out = row<T>(args.out, token, head);
    args.lse.at(token, head) = w.lse;
    if (!w.sees_a || !w.sees_b) {
      scale_row(out, w.sees_a ? a : w.sees_b ? b : nullptr, w.sees_a ? w.a : w.b, args.dim);
      return;
    }
    for (int64_t d = 0; d < args.dim; d += W) {
      const int n = args.dim - d < W ? int(args.dim - d) : W;
      store_n(out + d, load_n(a + d, n) * w.a + load_n(b + d, n) * w.b, n);
    }
  });
}

// With out_a − out = w_b (out_a − out_b): d lse_a = w_a (w_b g·(out_a − out_b) + g_lse),
// d lse_b = w_b (g_lse − w_a g·(out_a − out_b)).
template <class T>
void backward_rows(const MergeArgs& args, int threads) {
  const bool lse_needed = args.grad_lse_a.data != nullptr || args.grad_lse_b.data != nullptr;
  each_row<T>(args, threads, [&](int64_t token, int64_t head, Weights w) {
    const T* g = row<T>(args.out, token, head);
    scale_row(row<T>(args.grad_out_a, token, head), w.sees_a ? g : nullptr, w.a, args.dim);
    scale_row(row<T>(args.grad_out_b, token, head), w.sees_b ? g : nullptr, w.b, args.dim);
    if (!lse_needed) return;
    float dot = 0.0f;
    if (g != nullptr && w.sees_a && w.sees_b) {
      const T *a = row<T>(args.out_a, token, head), *b = row<T>(args.out_b, token, head);
      vf sum = {};
      for (int64_t d = 0; d < args.dim; d += W) {
        const int n = args.dim - d < W ? int(args.dim - d) : W;
        sum = fma(load_n(g + d, n), load_n(a + d, n) - load_n(b + d, n), sum);
      }
      dot = hsum(sum);
    }
    const float g_lse = args.lse.data != nullptr ? args.lse.at(token, head) : 0.0f;
    if (args.grad_lse_a.data != nullptr) args.grad_lse_a.at(token, head) = w.sees_a ? w.a * (g_lse + w.b * dot) : 0.0f;
    if (args.grad_lse_b.data != nullptr) args.grad_lse_b.at(token, head) = w.sees_b ? w.b * (g_lse - w.a * dot) : 0.0f;
  });
}

void forward(const MergeArgs& args, int threads) {
  if (args.dtype == DType::f32) forward_rows<float>(args, threads);
  else if (args.dtype == DType::bf16) forward_rows<bf16_t>(args, threads);
  else forward_rows<f16_t>(args, threads);
}

void backward(const MergeArgs& args, int threads) {
  if (args.dtype == DType::f32) backward_rows<float>(args, threads);
  else if (args.dtype == DType::bf16) backward_rows<bf16_t>(args, threads);
  else backward_rows<f16_t>(args, threads);
}

}  // namespace

extern const MergeKernels merge_kernels = {&forward, &backward};

}  // namespace longvita::LV_ISA
