// One tile of decode_attention: kKeys keys of a cache against up to kRows rows of queries a key/value head, in three steps that are the
// same in three arithmetics:
//
//   Wide    q, P and the cache as fp32, widened on the way into registers                     any cache, any instruction set
//   Pairs   q, P and the cache as pairs of bf16 (dot_pairs)                                   bf16 queries, bf16 cache
//   Words   the codes as 16-bit integers, q and P scaled to 15 bits and a sign (dot_words)    bf16 queries, int8 cache
//
// An Operand is W lanes of what one multiply-add takes, a Sum what it gives. Keys may lie in the cache (element type of the cache) or
// unpacked in a buffer (Unpacked).
#pragma once
#include <algorithm>
#include <type_traits>
#include <utility>

#include "decode_plan.h"
#include "simd.h"

namespace longvita::LV_ISA {
namespace {

constexpr int kTogether = W == 16 ? 4 : 2;      // keys, and vectors of columns, in one register tile of up to 5 rows
static_assert(kKeys % W == 0 && W % kTogether == 0, "a row of scores is whole vectors");
static_assert(!kBf16Pairs || kKeys == 2 * W, "key i is paired with key i + W");

// ---------------------------------------------------------------------------------------------- the three arithmetics

LV_INLINE vf from_i8(const int8_t* p) { return __builtin_convertvector(widen_bytes(p), vf); }

// The 7 bits of magnitude, shifted into a float's place, are the value times 2^-120.
LV_INLINE vf from_e4m3(const uint8_t* p) {
  const vu u = (vu)widen_bytes(p), magnitude = u & 0x7f;
  const vf value = (vf)(magnitude << 20) * 0x1p120f;
  const vf bounded = select((vi)(magnitude == 0x7f), splat(std::numeric_limits<float>::quiet_NaN()), value);
  return (vf)((vu)bounded | ((u & 0x80) << 24));
}

LV_INLINE vu load_raw(const void* p) {
  vu v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

LV_INLINE vu spread_unit(const void* p) {
  uint32_t unit;
  std::memcpy(&unit, p, sizeof unit);
  return vu{} + unit;
}

struct Wide {
  using Operand = vf;
  using Sum = vf;
  using Unpacked = float;
  static constexpr int kColumns = W;      // of one operand
  template <class C>
  LV_INLINE vf operand(const C* x) {
    if constexpr (std::is_same_v<C, int8_t>) return from_i8(x);
    else if constexpr (std::is_same_v<C, uint8_t>) return from_e4m3(x);
    else return load(x);
  }
  LV_INLINE vf mac(vf sum, vf a, vf b) { return fma(a, b, sum); }
  LV_INLINE vf spread(const float* p) { return splat(*p); }
  LV_INLINE vf to_float(vf sum) { return sum; }
};

struct Pairs {
  using Operand = vu;
  using Sum = vf;
  using Unpacked = bf16_t;
  static constexpr int kColumns = 2 * W;
  LV_INLINE vu operand(const bf16_t* x) { return load_raw(x); }
  LV_INLINE vf mac(vf sum, vu a, vu b) { return dot_pairs(sum, a, b); }
  LV_INLINE vu spread(const float* p) { return spread_unit(p); }
  LV_INLINE vf to_float(vf sum) { return sum; }
  LV_INLINE vu weights(vf even, vf odd) { return pack_pairs(even, odd); }
};

struct Words {
  using Operand = vu;
  using Sum = vi;
  using Unpacked = int16_t;
  static constexpr int kColumns = 2 * W;
  LV_INLINE vu operand(const int8_t* x) { return widen_words(x); }
  LV_INLINE vu operand(const int16_t* x) { return load_raw(x); }
  LV_INLINE vi mac(vi sum, vu a, vu b) { return dot_words(sum, a, b); }
  LV_INLINE vu spread(const float* p) { return spread_unit(p); }
  LV_INLINE vf to_float(vi sum) { return __builtin_convertvector(sum, vf); }
  LV_INLINE vu weights(vf even, vf odd) { return pack_words(even, odd); }
};
constexpr float kLargestWord = 32767.0f;

// `count` elements of a row as operands, zeros behind them. Returns where they are.
template <class A, class C>
const typename A::Unpacked* unpack_row(const C* x, int64_t count, typename A::Unpacked* out) {
  int64_t d = 0;
  for (; d + A::kColumns <= count; d += A::kColumns) {
    const typename A::Operand value = A::operand(x + d);
    std::memcpy(out + d, &value, sizeof value);
  }
  if (d < count) {
    C last[A::kColumns] = {};
    std::memcpy(last, x + d, size_t(count - d) * sizeof(C));
    const typename A::Operand value = A::operand(last);
    std::memcpy(out + d, &value, sizeof value);
  }
  return out;
}

// ---------------------------------------------------------------------------------------------- the next tile
// Asks for the next tile, line by line as the present one is read, into L2, because L1 is full. Keys and values, first and second half of
// the tile, in turns: a core has some twenty requests of its own under way, too few for the memory's latency; what fills the memory's time is
// the prefetcher of L2, which runs ahead in every page that it sees read in order, and several pages are more than one.
struct Ahead {
  static constexpr int kStreams = 4;
  const KvCache& cache;
  int64_t sequence, head, heads, position, end;
  int64_t half = (end - position + 1) / 2, at = 0, next = 0;      // token of each half, head of it
  const char *line[kStreams] = {cache.k.data, cache.k.data, cache.k.data, cache.k.data}, *last = cache.k.data;
  int pending = 0;      // lines, less than one of each stream

  template <int Lines>
  void ask() {
    if constexpr (Lines < kStreams) {
      if ((pending += Lines) < kStreams) return;
      pending = 0;
    }
    constexpr int kEach = std::max(1, Lines / kStreams);
#pragma GCC unroll 8
    for (int i = 0; i < kEach * kStreams; ++i) __builtin_prefetch(line[i % kStreams] + i / kStreams * 64, 0, 2);
    for (const char*& p : line) p += kEach * 64;
    if (line[0] >= last) turn();
  }

 private:
  __attribute__((noinline)) void turn() {
    if (at >= half) {      // nothing left: the same lines again, which cost nothing
      for (const char*& p : line) p = cache.k.data;
      return void(last = cache.k.data);
    }
    const int64_t size = int64_t(dtype_size(cache.dtype));
    const bool dense = cache.k.stride_head == cache.dim && cache.v.stride_head == cache.dim;      // all heads are one run of memory
    for (int i = 0; i < kStreams; ++i) {
      const CacheSide& side = i % 2 == 0 ? cache.k : cache.v;
      const int64_t token = std::min(end - 1, position + at + i / 2 * half), row = cache.row(sequence, token), column = cache.column(token);
      line[i] = side.data + size * side.at(row, column, head + next);
      if (side.scale != nullptr) __builtin_prefetch(&side.scale_at(row, column, head), 0, 2);
    }
    last = line[0] + size * (dense ? heads : 1) * cache.dim;
    next += dense ? heads : 1;
    if (next == heads) next = 0, ++at;
  }
};

// ---------------------------------------------------------------------------------------------- products

// f(count, first row), count a compile-time 1 to 5: all rows in groups that fill a register tile.
template <class F>
LV_INLINE void in_groups(int64_t rows, F f) {
  const int64_t most = rows % 5 == 0 ? 5 : 4;      // 5: the group of Qwen2.5-14B, with nothing left over
  for (int64_t r = 0; r < rows;) {
    const int64_t now = std::min(most, rows - r);
    switch (now) {
      case 5: f(std::integral_constant<int, 5>{}, r); break;
      case 4: f(std::integral_constant<int, 4>{}, r); break;
      case 3: f(std::integral_constant<int, 3>{}, r); break;
      case 2: f(std::integral_constant<int, 2>{}, r); break;
      default: f(std::integral_constant<int, 1>{}, r);
    }
    r += now;
  }
}

// Lines that one step reads.
template <class A, class X>
constexpr int kLines = std::max<int>(1, kTogether * A::kColumns * int(sizeof(X)) / 64);

// scores[r][j] = q[r] · k[j] for R rows and W keys. 
// Keys b, b + W/kTogether, b + 2W/kTogether, … together: their sums meet in the first steps of the sum across lanes, so that only one
// vector in kTogether waits for the last steps.
template <class A, int R, class X>
LV_INLINE void dot_tile(const typename A::Unpacked* q, const X* const k[W], int64_t width, float* scores, Ahead& ahead) {
  using Sum = typename A::Sum;
  constexpr int kBatches = W / kTogether;
  const auto add = [](Sum a, Sum b) { return a + b; };
  Sum sums[R][kBatches];
#pragma GCC unroll 1
  for (int b = 0; b < kBatches; ++b) {
    Sum acc[R][kTogether] = {};
    for (int64_t d = 0; d < width; d += A::kColumns) {
      ahead.ask<kLines<A, X>>();
      typename A::Operand x[kTogether];
#pragma GCC unroll 4
      for (int i = 0; i < kTogether; ++i) x[i] = A::operand(k[b + i * kBatches] + d);
#pragma GCC unroll 5
      for (int r = 0; r < R; ++r) {
        const typename A::Operand row = A::operand(q + r * width + d);
#pragma GCC unroll 4
        for (int i = 0; i < kTogether; ++i) acc[r][i] = A::mac(acc[r][i], row, x[i]);
      }
    }
#pragma GCC unroll 5
    for (int r = 0; r < R; ++r) sums[r][b] = fold<kTogether, W / 2>(acc[r], add);
  }
#pragma GCC unroll 5
  for (int r = 0; r < R; ++r) store(scores + r * kKeys, A::to_float(fold<kBatches, kBatches / 2>(sums[r], add)));
}

template <class A, class X>
void score_keys(const typename A::Unpacked* q, int64_t rows, const X* const k[W], int64_t width, float* scores, Ahead& ahead) {
  in_groups(rows, [&](auto count, int64_t r) {
    dot_tile<A, decltype(count)::value>(q + r * width, k, width, scores + r * kKeys, ahead);
  });
}

// Columns of the values of one step: W of one key a vector, or in pairs, W of keys j and j + W. Pairs leave the columns of two vectors
// dealt out to them four by four (`straighten`).
template <class A, int C, class X>
LV_INLINE void load_columns(const X* const v[kKeys], int j, int64_t column, typename A::Operand x[C]) {
  if constexpr (A::kColumns == W) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) x[c] = A::operand(v[j] + column + c * W);
  } else {
#pragma GCC unroll 4
    for (int c = 0; c < C; c += 2) {
      const vu a = A::operand(v[j] + column + c * W), b = A::operand(v[j + W] + column + c * W);
      x[c] = zip_low(a, b), x[c + 1] = zip_high(a, b);
    }
  }
}

// out[r] = out[r] · keep[r] + gain[r] · Σ_j p[r][j] v[j], for R rows and C vectors of columns from `column` on
template <class A, int R, int C, class X>
LV_INLINE void sum_tile(const float* p, const X* const v[kKeys], int steps, int64_t column, const float* keep,
                        const float* gain, int64_t width, float* out, Ahead& ahead) {
  typename A::Sum acc[R][C] = {};
  for (int j = 0; j < steps; ++j) {
    ahead.ask<kLines<A, X>>();
    typename A::Operand x[C];
    load_columns<A, C>(v, j, column, x);
#pragma GCC unroll 5
    for (int r = 0; r < R; ++r) {
      const typename A::Operand weight = A::spread(p + r * kKeys + j);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) acc[r][c] = A::mac(acc[r][c], weight, x[c]);
    }
  }
#pragma GCC unroll 5
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      float* at = out + r * width + column + c * W;
      store(at, fma(A::to_float(acc[r][c]), splat(gain[r]), load(at) * keep[r]));
    }
  }
}

// The next vectors of columns, as many as fit a register tile, for all rows; returns the column after them.
template <class A, class X>
int64_t sum_columns(const float* p, int64_t rows, const X* const v[kKeys], int steps, int64_t column, const float* keep,
                    const float* gain, int64_t width, float* out, Ahead& ahead) {
  const int64_t left = (width - column) / W;
  const int vectors = left >= kTogether ? kTogether : left >= 2 ? 2 : 1;
  in_groups(rows, [&](auto count, int64_t r) {
    constexpr int R = decltype(count)::value;
    const auto tile = [&](auto c) {
      sum_tile<A, R, decltype(c)::value>(p + r * kKeys, v, steps, column, keep + r, gain + r, width, out + r * width, ahead);
    };
    if (vectors == kTogether) return tile(std::integral_constant<int, kTogether>{});
    if constexpr (kTogether > 2) {
      if (vectors == 2) return tile(std::integral_constant<int, 2>{});
    }
    if constexpr (A::kColumns == W) tile(std::integral_constant<int, 1>{});
  });
  return column + vectors * W;
}

// Columns in order again, after sums over pairs.
inline void straighten(float* row, int64_t width) {
  for (int64_t d = 0; d < width; d += 2 * W) {
    const vf low = load(row + d), high = load(row + d + W);
    store(row + d, unzip_first(low, high)), store(row + d + W, unzip_second(low, high));
  }
}

// ---------------------------------------------------------------------------------------------- softmax

// The state of `rows` rows (all heads of a block), padded to whole vectors.
struct Softmax {
  float *maximum, *total;      // so far, maximum in units of log2
  float *keep, *gain;          // of the present tile: what older sums and what its own are multiplied by
  const float *q_step;         // what the products of a row are to be multiplied by
  float *v_step;               // likewise the sums of a row
};

template <class A>
struct SoftmaxTile {
  float softcap;
  bool whole;                  // every row sees every key
  const int *from, *to;        // else the keys that a row of a head sees
  int64_t heads, rows;         // rows of a head
  float *scores;               // (heads · rows, kKeys); weights in the same place afterwards, in pairs the first W
  const float *k_factors, *v_factors;      // (heads, kKeys), or null: 1
};

// Scores → weights relative to the maximum of their own tile, and for every row the factors that join the tile to those before it. A vector
// over the keys first, then, W rows at a time, over the rows: a sum across lanes costs a third where W are made at once.
template <class A>
void soften(const SoftmaxTile<A>& t, const Softmax& s) {
  constexpr int kVectors = kKeys / W;
  const int64_t rows = t.heads * t.rows;
  const vf minus_infinity = splat(-kInf);
  for (int64_t first = 0; first < rows; first += W) {
    const int now = int(std::min<int64_t>(W, rows - first));
    vf each[W];
    for (int i = 0; i < now; ++i) {
      const int64_t r = first + i, head = r / t.rows;
      float* scores = t.scores + r * kKeys;
      const vf step = splat(s.q_step[r]);
      vf top = minus_infinity;
#pragma GCC unroll 2
      for (int j = 0; j < kKeys; j += W) {
        vf x = load(scores + j) * step;
        if (t.k_factors != nullptr) x *= load(t.k_factors + head * kKeys + j);
        if (t.softcap > 0.0f) x = vtanh(x * (1.0f / t.softcap)) * t.softcap;
        x *= kLog2e;
        if (!t.whole) {
          const vi at = iota() + j;
          x = select((at >= t.from[r % t.rows]) & (at < t.to[r % t.rows]), x, minus_infinity);
        }
        top = vmax(x, top);
        store(scores + j, x);
      }
      each[i] = top;
    }
    for (int i = now; i < W; ++i) each[i] = minus_infinity;
    const vf top = fold<W, W / 2>(each, [](vf a, vf b) { return vmax(a, b); }), before = load(s.maximum + first);
    const vf larger = vmax(top, before), base = larger == minus_infinity ? vf{} : larger;
    const vf own = top == minus_infinity ? vf{} : top;
    const vf keep = vexp2(before - base), gain = vexp2(top - base);
    float bases[W];
    store(bases, own);
    for (int i = 0; i < now; ++i) {
      const int64_t r = first + i;
      float* scores = t.scores + r * kKeys;
      vf total = {}, weight[kVectors];
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) {
        weight[j] = vexp2(load(scores + j * W) - bases[i]);
        total += weight[j];
        if (t.v_factors != nullptr) weight[j] *= load(t.v_factors + r / t.rows * kKeys + j * W);
      }
      each[i] = total;
      if constexpr (A::kColumns == W) {
#pragma GCC unroll 8
        for (int j = 0; j < kVectors; ++j) store(scores + j * W, weight[j]);
      } else {
        const vu pairs = A::weights(weight[0], weight[1]);
        std::memcpy(scores, &pairs, sizeof pairs);
      }
    }
    for (int i = now; i < W; ++i) each[i] = vf{};
    const vf total = fold<W, W / 2>(each, [](vf a, vf b) { return a + b; });
    store(s.total + first, fma(total, gain, load(s.total + first) * keep));
    store(s.maximum + first, larger);
    store(s.keep + first, keep);
    store(s.gain + first, gain * load(s.v_step + first));
  }
}

}  // namespace
}  // namespace longvita::LV_ISA
