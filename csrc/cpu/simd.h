// Vectors of W floats, W = 4, 8 or 16 by instruction set, on the compilers' vector extension.
// 16-lane code also compiles for AVX2 (the compiler splits the vectors), so that the AVX-512 paths can be tested anywhere.
// Intrinsics stand only where the extension has no word for the instruction (max, half-precision conversion, bf16 dot product) or GCC 12 does
// not find it (integers of 8 and 16 bits to 32).
//
//   vf, vi          W floats, W int32            load/store(T*)      T = float, bf16_t, f16_t; unaligned; rounding to nearest even
//   splat(x)        all lanes x                  load_n/store_n      the first n lanes; the others read 0 / are left alone
//   a * b + c       contracted to fma            vmax, select, vexp2, vtanh, hsum, hmax
//   dot_pairs       c + lo(a)·lo(b) + hi(a)·hi(b) per lane, on pairs of bf16; dot_words the same on pairs of 16-bit integers
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "longvita/dtype.h"

#define LV_INLINE static inline __attribute__((always_inline))

namespace longvita::LV_ISA {

constexpr int W = LV_WIDTH;
// True where bf16 inputs are multiplied as pairs, without being widened first.
#if defined(__AVX512BF16__) || defined(LV_EMULATED)
constexpr bool kBf16Pairs = true;
#else
constexpr bool kBf16Pairs = false;
#endif
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));

LV_INLINE vf splat(float x) { return x - vf{}; }      // folds to a broadcast (x - 0 is x; 0 + x would lose the sign of zero)
LV_INLINE vi splat_i(int32_t x) { return vi{} + x; }
LV_INLINE vf as_vf(vi x) { return (vf)x; }
LV_INLINE vi as_vi(vf x) { return (vi)x; }
LV_INLINE vf select(vi mask, vf a, vf b) { return mask ? a : b; }
LV_INLINE vi iota() {
  vi out;
  for (int i = 0; i < W; ++i) out[i] = i;
  return out;
}

// ---------------------------------------------------------------------------------------------- conversions
// W integers of 16 or 8 bits as 32 bits.
LV_INLINE vu widen_u16(vh x) {
#if defined(__AVX512F__)
  return (vu)_mm512_cvtepu16_epi32((__m256i)x);
#elif defined(__AVX2__) && LV_WIDTH == 8
  return (vu)_mm256_cvtepu16_epi32((__m128i)x);
#else
  return __builtin_convertvector(x, vu);
#endif
}
template <class T>
LV_INLINE vu load_u16(const T* p) {      // the bits of W bf16 or f16
  vh h;
  std::memcpy(&h, p, sizeof h);
  return widen_u16(h);
}
template <class Byte>
LV_INLINE vi widen_bytes(const Byte* p) {
  [[maybe_unused]] constexpr bool kSigned = Byte(-1) < 0;
#if defined(__AVX512F__)
  const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (vi)(kSigned ? _mm512_cvtepi8_epi32(x) : _mm512_cvtepu8_epi32(x));
#elif defined(__AVX2__) && LV_WIDTH == 8
  const __m128i x = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return (vi)(kSigned ? _mm256_cvtepi8_epi32(x) : _mm256_cvtepu8_epi32(x));
#else
  vi out;
  for (int i = 0; i < W; ++i) out[i] = p[i];
  return out;
#endif
}

LV_INLINE vf widen(vh x, bf16_t) { return (vf)(widen_u16(x) << 16); }

LV_INLINE vh narrow(vf x, bf16_t) {
#if defined(__AVX512BF16__)      // one instruction; it takes denormals as 0, as the products of pairs do
  return (vh)_mm512_cvtneps_pbh((__m512)x);
#else
  const vu u = (vu)x;
  const vu rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  const vu nan = (vu)(vi)(x != x);
  return __builtin_convertvector((nan & 0x7fc0) | (~nan & rounded), vh);
#endif
}

#if defined(__F16C__)
LV_INLINE vf widen(vh x, f16_t) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps((__m256i)x);
#elif LV_WIDTH == 8
  return (vf)_mm256_cvtph_ps((__m128i)x);
#else
  union { vf out; __m256 half[2]; } u;
  union { vh in; __m128i half[2]; } v = {x};
  for (int i = 0; i < 2; ++i) u.half[i] = _mm256_cvtph_ps(v.half[i]);
  return u.out;
#endif
}
LV_INLINE vh narrow(vf x, f16_t) {
#if defined(__AVX512F__)
  return (vh)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT);
#elif LV_WIDTH == 8
  return (vh)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
#else
  union { vf in; __m256 half[2]; } u = {x};
  union { vh out; __m128i half[2]; } v;
  for (int i = 0; i < 2; ++i) v.half[i] = _mm256_cvtps_ph(u.half[i], _MM_FROUND_TO_NEAREST_INT);
  return v.out;
#endif
}
#else
LV_INLINE vf widen(vh x, f16_t) {
  const vu h = __builtin_convertvector(x, vu);
  const vu sign = (h & 0x8000) << 16, body = (h & 0x7fff) << 13;
  const vi special = (vi)(body >= 0x0f800000u);                                   // infinity or NaN: exponent to all ones
  const vf scaled = (vf)body * 0x1p112f;                                          // re-biases; denormals come out exact
  const vu bits = special ? (body | 0x7f800000u) : (vu)scaled;
  return (vf)(bits | sign);
}
LV_INLINE vh narrow(vf x, f16_t) {
  const vu u = (vu)x, sign = (u >> 16) & 0x8000, body = u & 0x7fffffffu;
  const vu normal = (body - 0x38000000u + 0xfff + ((body >> 13) & 1)) >> 13;
  const vu tiny = (vu)((vf)body + 0.5f) - 0x3f000000u;                            // below 2^-14: let the adder round to 2^-24
  const vu big = body > 0x7f800000u ? vu{} + 0x7e00u : vu{} + 0x7c00u;
  vu out = body < 0x38800000u ? tiny : normal;
  out = body >= 0x477ff000u ? big : out;
  return __builtin_convertvector(out | sign, vh);
}
#endif

// ---------------------------------------------------------------------------------------------- loads and stores
LV_INLINE vf load(const float* p) {
  vf v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
LV_INLINE void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }
LV_INLINE vi load_i(const int32_t* p) {
  vi v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
LV_INLINE vf load(const T* p) {
  vh h;
  std::memcpy(&h, p, sizeof h);
  return widen(h, T{});
}
template <class T>
LV_INLINE void store(T* p, vf v) {
  const vh h = narrow(v, T{});
  std::memcpy(p, &h, sizeof h);
}
template <class T>
LV_INLINE vf load_n(const T* p, int n) {
  if (n == W) return load(p);
  T buffer[W] = {};
  std::memcpy(buffer, p, size_t(n) * sizeof(T));
  return load(buffer);
}
template <class T>
LV_INLINE void store_n(T* p, vf v, int n) {
  if (n == W) return store(p, v);
  T buffer[W];
  store(buffer, v);
  std::memcpy(p, buffer, size_t(n) * sizeof(T));
}

// ---------------------------------------------------------------------------------------------- arithmetic
LV_INLINE vf fma(vf a, vf b, vf c) { return a * b + c; }

// max(a, b); b where either is NaN.
LV_INLINE vf vmax(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX__) && LV_WIDTH == 8
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__SSE__) && LV_WIDTH == 4
  return (vf)_mm_max_ps((__m128)a, (__m128)b);
#else
  return a > b ? a : b;
#endif
}
LV_INLINE vf vabs(vf x) { return (vf)((vu)x & 0x7fffffffu); }

LV_INLINE float hsum(vf v) {      // pairwise, so that the order does not depend on the compiler
  float x[W];
  store(x, v);
  for (int half = W / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) x[i] += x[i + half];
  }
  return x[0];
}
// W × W words in place, in log2(W) rounds: a round of distance H swaps the lanes with bit H set of x[i] with those without it of x[i + H].
template <int H = W / 2>
LV_INLINE void transpose(vf* x) {
  vi low, high;
  for (int l = 0; l < W; ++l) {
    low[l] = (l & H) == 0 ? l : W + l - H;
    high[l] = (l & H) == 0 ? l + H : W + l;
  }
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) {
    if ((i & H) != 0) continue;
    const vf a = x[i], b = x[i + H];
    x[i] = __builtin_shuffle(a, b, low);
    x[i + H] = __builtin_shuffle(a, b, high);
  }
  if constexpr (H > 1) transpose<H / 2>(x);
}

// Lane i: op over the lanes of x[i], for W vectors at once: fold<W, W / 2>(x, op); overwrites x. A third of the instructions of W times
// hsum, whose order it has. Two vectors become one in every step, by a blend, a shuffle and op.
// In two stages: fold<N, W / 2> of every W/N-th vector gives one each, and fold<W / N, W / N / 2> of these the same result.
template <int N, int H, class V, class Op>
LV_INLINE V fold(V* x, Op op) {
  if constexpr (N == 1) {
    return x[0];
  } else {
    vi second, crossed;
    for (int l = 0; l < W; ++l) second[l] = (l & H) == 0 ? 0 : -1, crossed[l] = (l & H) == 0 ? l + H : W + l - H;
#pragma GCC unroll 8
    for (int i = 0; i < N / 2; ++i) x[i] = op(second ? x[i + N / 2] : x[i], __builtin_shuffle(x[i], x[i + N / 2], crossed));
    return fold<N / 2, H / 2>(x, op);
  }
}
// The same of W vectors that lie one behind the other, merged depth first: six registers at a time instead of W.
template <class V, int H = 1>
LV_INLINE V fold_sums(const float* x) {
  if constexpr (H == W) {
    V value;
    std::memcpy(&value, x, sizeof value);
    return value;
  } else {
    vi second, crossed;
    for (int l = 0; l < W; ++l) second[l] = (l & H) == 0 ? 0 : -1, crossed[l] = (l & H) == 0 ? l + H : W + l - H;
    const V a = fold_sums<V, 2 * H>(x), b = fold_sums<V, 2 * H>(x + H * W);
    return (second ? b : a) + __builtin_shuffle(a, b, crossed);
  }
}
LV_INLINE float hmax(vf v) {
  float x[W];
  store(x, v);
  float m = x[0];
  for (int i = 1; i < W; ++i) m = m < x[i] ? x[i] : m;
  return m;
}

// (2^f - 1) / f for |f| <= 1/2: minimax, 2^f to 2e-9 before rounding.
LV_INLINE vf exp2_poly(vf f) {
  vf p = splat(1.535336202e-4f);
  p = p * f + 1.339887465e-3f;
  p = p * f + 9.618437359e-3f;
  p = p * f + 5.550332471e-2f;
  p = p * f + 2.402264791e-1f;
  return p * f + 6.931472029e-1f;
}

// 2^x for x <= 127. Exactly 0 at -inf and far below (below -126.5 it may be denormal), exactly 1 at 0, NaN stays NaN.
LV_INLINE vf vexp2(vf x) {
#if defined(__AVX512DQ__)
  const vf f = (vf)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return (vf)_mm512_scalef_ps((__m512)(exp2_poly(f) * f + 1.0f), (__m512)(x - f));
#else
  const vf magic = splat(12582912.0f + 127.0f);        // 1.5 * 2^23: the sum's low bits are round(x) + 127, the exponent of 2^round(x)
  x = vmax(splat(-127.0f), x);
  const vf z = x + magic;
  const vf f = x - (z - magic);
  return (exp2_poly(f) * f + 1.0f) * (vf)((vu)z << 23);
#endif
}

// log2(x) = whole + fraction for normal x > 0, |fraction| <= 1/2, accurate to about 1e-8 absolutely. NaN and infinity give NaN or nonsense.
LV_INLINE vi log2_exponent(vf x) { return (vi)((vu)x - 0x3f3504f3u) >> 23; }      // 0 for x in [sqrt(1/2), sqrt(2))
LV_INLINE vf vlog2_whole(vf x) { return __builtin_convertvector(log2_exponent(x), vf); }
LV_INLINE vf vlog2_fraction(vf x) {
  const vf m = (vf)((vi)x - (log2_exponent(x) << 23)) , z = (m - 1.0f) / (m + 1.0f), z2 = z * z;       // log2 m = 2/ln2 · artanh z, |z| < 0.172
  vf p = splat(2.0f / (11 * kLn2));
  p = p * z2 + 2.0f / (9 * kLn2);
  p = p * z2 + 2.0f / (7 * kLn2);
  p = p * z2 + 2.0f / (5 * kLn2);
  p = p * z2 + 2.0f / (3 * kLn2);
  const vf nan = x - x;       // 0 for finite x
  return p * z2 * z + z * (2.0f / kLn2) + nan;
}

// tanh through expm1: relative error a few ulp, also near 0.
LV_INLINE vf vtanh(vf x) {
  const vf magic = splat(12582912.0f);
  const vf a = vabs(x), capped = a > 10.0f ? splat(10.0f) : a;
  const vf t = capped * (2.0f * kLog2e), z = t + magic, n = z - magic;
  const vf r = (capped * 2.0f - n * 0.693145751953125f) - n * 1.42860682030941723212e-6f;      // ln 2 in two parts
  vf p = splat(1.9841270e-4f);                                                                   // expm1(r), |r| <= 0.35
  p = p * r + 1.3888889e-3f;
  p = p * r + 8.3333333e-3f;
  p = p * r + 4.1666667e-2f;
  p = p * r + 1.6666667e-1f;
  p = p * r + 0.5f;
  p = (p * r) * r + r;
  const vf two_n = (vf)(((vu)z + 127u) << 23);
  const vf e = two_n * p + (two_n - 1.0f);
  const vf out = e / (e + 2.0f);
  return select((vi)(x != x), x, (vf)((vu)out | ((vu)x & 0x80000000u)));
}

// ---------------------------------------------------------------------------------------------- pairs of bf16
// One 32-bit unit holds two bf16: the even element low, the odd element high.
LV_INLINE uint32_t bf16_bits(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  if (x != x) return 0x7fc0;
  return (u + 0x7fff + ((u >> 16) & 1)) >> 16;
}

// even[i] and odd[i] side by side in word i.
LV_INLINE vu pack_pairs(vf even, vf odd) {
#if defined(__AVX512BF16__)
  typedef uint16_t v32 __attribute__((vector_size(64)));
  v32 order;
  for (int i = 0; i < W; ++i) order[2 * i] = uint16_t(i), order[2 * i + 1] = uint16_t(W + i);
  return (vu)_mm512_permutexvar_epi16((__m512i)order, (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even));
#else
  const vu lo = __builtin_convertvector(narrow(even, bf16_t{}), vu), hi = __builtin_convertvector(narrow(odd, bf16_t{}), vu);
  return lo | (hi << 16);
#endif
}

// Words of two rows of n <= 2W bf16: the even row in the low halves, the odd one (or zeros) in the high halves.
struct Zipped {
  vf low, high;      // words of lanes 0 … W-1 and W … 2W-1
};
LV_INLINE Zipped zip_bf16(const bf16_t* even, const bf16_t* odd, int n) {
  typedef uint16_t vs __attribute__((vector_size(W * 4)));
  vs a = {}, b = {}, low = {}, high = {};
  if (n == 2 * W && odd != nullptr) {
    std::memcpy(&a, even, sizeof a);
    std::memcpy(&b, odd, sizeof b);
  } else {
    std::memcpy(&a, even, size_t(n) * 2);
    if (odd != nullptr) std::memcpy(&b, odd, size_t(n) * 2);
  }
  for (int i = 0; i < 2 * W; ++i) {
    low[i] = uint16_t(i / 2 + i % 2 * 2 * W);
    high[i] = uint16_t(W + i / 2 + i % 2 * 2 * W);
  }
  return {(vf)__builtin_shuffle(a, b, low), (vf)__builtin_shuffle(a, b, high)};
}

LV_INLINE vf dot_pairs(vf c, vu a, vu b) {
#if defined(__AVX512BF16__)
  return (vf)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
#else
  c = (vf)(a << 16) * (vf)(b << 16) + c;
  return (vf)(a & 0xffff0000u) * (vf)(b & 0xffff0000u) + c;
#endif
}

// ---------------------------------------------------------------------------------------------- pairs of 16-bit integers
// 2 W bytes as 16-bit integers, two to a unit.
LV_INLINE vu widen_words(const int8_t* p) {
#if defined(__AVX512BW__)
  return (vu)_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#else
  vu out;
  for (int i = 0; i < W; ++i) out[i] = uint32_t(uint16_t(p[2 * i])) | uint32_t(uint16_t(p[2 * i + 1])) << 16;
  return out;
#endif
}

// The nearest integers (even on ties) of |x| < 2^15, two to a unit.
LV_INLINE vu pack_words(vf even, vf odd) {
  const float magic = 12582912.0f;      // 1.5 · 2^23: the sum's low bits are the integer
  return ((vu)(even + magic) & 0xffffu) | ((vu)(odd + magic) << 16);
}

LV_INLINE vi dot_words(vi c, vu a, vu b) {
#if defined(__AVX512VNNI__)
  return (vi)_mm512_dpwssd_epi32((__m512i)c, (__m512i)a, (__m512i)b);
#else
  return c + ((vi)(a << 16) >> 16) * ((vi)(b << 16) >> 16) + ((vi)a >> 16) * ((vi)b >> 16);
#endif
}

// Units (a[i], b[i]) of two vectors of 16-bit elements. Of each 8 elements the first 4 are in zip_low and the others in zip_high: shuffles
// within 128 bits are the cheap ones. unzip_first and unzip_second bring the units (W each, low and high) back into order.
typedef uint16_t vw __attribute__((vector_size(W * 4)));
template <int From>
LV_INLINE vu zip(vu a, vu b) {
  vw pick;
  for (int i = 0; i < 2 * W; ++i) pick[i] = uint16_t(i / 8 * 8 + i % 8 / 2 + From + (i % 2) * 2 * W);
  return (vu)__builtin_shuffle((vw)a, (vw)b, pick);
}
LV_INLINE vu zip_low(vu a, vu b) { return zip<0>(a, b); }
LV_INLINE vu zip_high(vu a, vu b) { return zip<4>(a, b); }
template <int From>
LV_INLINE vf unzip(vf low, vf high) {
  vi pick;
  for (int i = 0; i < W; ++i) pick[i] = From + i / 8 * 4 + i % 4 + (i / 4 % 2) * W;
  return __builtin_shuffle(low, high, pick);
}
LV_INLINE vf unzip_first(vf low, vf high) { return unzip<0>(low, high); }
LV_INLINE vf unzip_second(vf low, vf high) { return unzip<W / 2>(low, high); }

}  // namespace longvita::LV_ISA
