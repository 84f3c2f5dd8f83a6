// What the attention forward and backward share: operand packing, the register-tiled product, visibility limits, scratch.
//
// Everything is computed with queries in the vector lanes: scores are stored transposed, S[key][lane], a lane being one query row
// (position, head of the group). Softmax then needs no horizontal step, keys and values are broadcast, and one packed K or V block serves
// all query heads of its group. A *panel* is kLanes = 3 vectors of query rows with everything that belongs to them contiguous.
//
// Operands are stored in *units*: a float, or (Pairs) two neighbouring bf16 of the dimension that is summed over.
#pragma once
#include <algorithm>
#include <cstdint>

#include "attention.h"
#include "simd.h"

namespace longvita::LV_ISA {

constexpr int kVectors = 3;                       // register tile: 3 vectors of lanes × kBroadcast values
constexpr int kBroadcast = W == 16 ? 8 : 4;       // 12 of 16 registers accumulate, 24 of 32 with AVX-512
constexpr int kLanes = kVectors * W;
constexpr int kMaxPanels = 16;                    // of one query block

struct Floats {
  using unit = float;
  using vec = vf;
  static constexpr int kPer = 1;
  LV_INLINE vec load_units(const unit* p) { return load(p); }
  LV_INLINE vec splat_unit(const unit* p) { return splat(*p); }
  LV_INLINE vf mad(vf c, vec a, vec b) { return a * b + c; }
};

struct Pairs {
  using unit = uint32_t;
  using vec = vu;
  static constexpr int kPer = 2;
  LV_INLINE vec load_units(const unit* p) {
    vec v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }
  LV_INLINE vec splat_unit(const unit* p) { return vec{} + *p; }
  LV_INLINE vf mad(vf c, vec a, vec b) { return dot_pairs(c, a, b); }
};

// ---------------------------------------------------------------------------------------------------- product
constexpr int64_t kChain = 64;      // longest run of additions into one register; runs are then added up, which keeps rounding errors small

// What a product does with what stands in c: replaces it, is added to it, or to c[j][lane] * factor[lane].
enum class Into { replace, add, rescale };

// c[j][lane] (+)= sum over r of a[r][lane] * b(j, r), for NB values of j.
// RowsB: b(j, r) = b[j * ldb + r]; otherwise b[r * ldb + j].
template <class Op, bool RowsB, int MV, int NB>
LV_INLINE void product_tile(int64_t units, const typename Op::unit* a, int64_t lda, const typename Op::unit* b, int64_t ldb, float* c,
                            int64_t ldc, Into into, const float* factor) {
  do {
    const int64_t chain = std::min(units, kChain);
    vf acc[NB][MV];
#pragma GCC unroll 16
    for (int j = 0; j < NB; ++j) {
#pragma GCC unroll 4
      for (int v = 0; v < MV; ++v) acc[j][v] = vf{};
    }
    for (int64_t r = 0; r < chain; ++r) {
      typename Op::vec lanes[MV];
#pragma GCC unroll 4
      for (int v = 0; v < MV; ++v) lanes[v] = Op::load_units(a + v * W);
#pragma GCC unroll 16
      for (int j = 0; j < NB; ++j) {
        const typename Op::vec x = Op::splat_unit(RowsB ? b + j * ldb : b + j);
#pragma GCC unroll 4
        for (int v = 0; v < MV; ++v) acc[j][v] = Op::mad(acc[j][v], lanes[v], x);
      }
      a += lda;
      b += RowsB ? 1 : ldb;
    }
#pragma GCC unroll 16
    for (int j = 0; j < NB; ++j) {
#pragma GCC unroll 4
      for (int v = 0; v < MV; ++v) {
        float* out = c + j * ldc + v * W;
        if (into == Into::replace) store(out, acc[j][v]);
        else store(out, (into == Into::rescale ? load(out) * load(factor + v * W) : load(out)) + acc[j][v]);
      }
    }
    into = Into::add;
    units -= chain;
  } while (units > 0);
}

template <class Op, bool RowsB, int MV>
void product_column(int64_t n, int64_t units, const typename Op::unit* a, int64_t lda, const typename Op::unit* b, int64_t ldb, float* c,
                    int64_t ldc, Into into, const float* factor) {
  for (int64_t j = 0; j < n; j += kBroadcast) {
    product_tile<Op, RowsB, MV, kBroadcast>(units, a, lda, RowsB ? b + j * ldb : b + j, ldb, c + j * ldc, ldc, into, factor);
  }
}

// n: a multiple of kBroadcast; vectors: lanes / W, any number.
template <class Op, bool RowsB>
void product(int64_t vectors, int64_t n, int64_t units, const typename Op::unit* a, int64_t lda, const typename Op::unit* b, int64_t ldb,
             float* c, int64_t ldc, Into into, const float* factor = nullptr) {
  while (vectors > 0) {
    const int64_t now = vectors == 4 ? 2 : std::min<int64_t>(vectors, kVectors);      // 4 as 2 + 2, not 3 + 1
    if (now == 3) product_column<Op, RowsB, 3>(n, units, a, lda, b, ldb, c, ldc, into, factor);
    else if (now == 2) product_column<Op, RowsB, 2>(n, units, a, lda, b, ldb, c, ldc, into, factor);
    else product_column<Op, RowsB, 1>(n, units, a, lda, b, ldb, c, ldc, into, factor);
    a += now * W, c += now * W, vectors -= now;
    if (factor != nullptr) factor += now * W;
  }
}

// ---------------------------------------------------------------------------------------------------- problem geometry
inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// One KV head of one document.
struct Unit {
  int64_t q0, q1, k0, k1, head, group;      // query and key tokens, KV head
  int64_t rows() const { return (q1 - q0) * group; }
  int64_t keys() const { return k1 - k0; }
};

inline Unit unit_of(const AttentionProblem& p, int64_t unit) {
  const int64_t doc = unit / p.kv_heads();
  return {p.cu_q[doc], p.cu_q[doc + 1], p.cu_k[doc], p.cu_k[doc + 1], unit % p.kv_heads(), p.group()};
}

// Keys that a query position sees: [low, high), relative to the document.
struct Limits { int32_t low, high; };
inline Limits limits_of(const AttentionProblem& p, const Unit& u, int64_t position) {
  const int64_t aligned = position + u.keys() - (u.q1 - u.q0);
  const int64_t low = p.left < 0 ? 0 : std::max<int64_t>(0, aligned - p.left);
  const int64_t high = p.right < 0 ? u.keys() : std::min<int64_t>(u.keys(), aligned + p.right + 1);
  return high > low ? Limits{int32_t(low), int32_t(high)} : Limits{0, 0};
}

// The rows of one panel: which they are, and what they see.
struct Panel {
  int rows = 0, vectors = 0;
  int32_t min_low = 0, max_low = 0, min_high = 0, max_high = 0;
  int64_t token[kLanes];      // of each row
  int32_t head[kLanes];

  // Address of row i in a tensor of (tokens, heads, dim).
  template <class T>
  T* row(const Rows3& x, int i) const {
    return reinterpret_cast<T*>(x.data) + token[i] * x.stride_token + head[i] * x.stride_head;
  }
};

// The panel that starts at row0 of the unit; low and high get kLanes entries (spare lanes repeat the last row).
inline Panel make_panel(const AttentionProblem& p, const Unit& u, int64_t row0, int32_t* low, int32_t* high) {
  Panel out;
  out.rows = int(std::min<int64_t>(kLanes, u.rows() - row0));
  out.vectors = (out.rows + W - 1) / W;
  int64_t position = row0 / u.group, member = row0 % u.group;
  Limits l = limits_of(p, u, position);
  out.min_low = out.max_low = l.low, out.min_high = out.max_high = l.high;
  for (int i = 0; i < kLanes; ++i) {
    if (i < out.rows) {
      out.token[i] = u.q0 + position, out.head[i] = int32_t(u.head * u.group + member);
      out.min_low = std::min(out.min_low, l.low), out.max_low = std::max(out.max_low, l.low);
      out.min_high = std::min(out.min_high, l.high), out.max_high = std::max(out.max_high, l.high);
    }
    low[i] = l.low, high[i] = l.high;
    if (++member == u.group && i + 1 < out.rows) member = 0, l = limits_of(p, u, ++position);
  }
  return out;
}

// The part of key block [key0, key0 + keys) that a panel touches, in whole register tiles, and the keys in it that every row sees: only
// those before and behind them need a mask (few, beside a diagonal). All relative to key0.
struct Span {
  int64_t begin = 0, end = 0;
  int64_t clear_begin = 0, clear_end = 0;
  bool empty() const { return end <= begin; }
  bool masked() const { return clear_begin > begin || clear_end < end; }
};
inline Span span_of(const Panel& panel, int64_t key0, int64_t keys) {
  Span s;
  s.begin = std::max<int64_t>(panel.min_low - key0, 0) / kBroadcast * kBroadcast;
  s.end = round_up(std::min<int64_t>(panel.max_high - key0, keys), kBroadcast);
  if (s.empty()) return s;
  s.clear_begin = std::clamp<int64_t>(panel.max_low - key0, s.begin, s.end);
  s.clear_end = std::clamp<int64_t>(panel.min_high - key0, s.clear_begin, s.end);
  return s;
}

// Rows see these keys of a block: lanes of `mask` all ones where key n (absolute in the document) is visible.
LV_INLINE vi visible(int32_t key, vi low, vi high) { return (vi)((low <= key) & (high > key)); }

// ---------------------------------------------------------------------------------------------------- packing
// out[column][lane], columns of units: the transposed query rows of a panel.
template <class Op, class T>
void pack_lanes(const Panel& panel, const Rows3& source, int64_t dim, typename Op::unit* out) {
  const int64_t columns = dim / Op::kPer;
  for (int v = 0; v < panel.vectors; ++v) {
    const T* rows[W];
    for (int i = 0; i < W; ++i) rows[i] = v * W + i < panel.rows ? panel.row<const T>(source, v * W + i) : nullptr;
    for (int64_t c = 0; c < columns; c += W) {
      const int n = int(std::min<int64_t>(W, columns - c));
      vf block[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) {
        if (rows[i] == nullptr) block[i] = vf{};
        else if constexpr (Op::kPer == 2) block[i] = load_n(reinterpret_cast<const float*>(rows[i]) + c, n);      // bits, two bf16 each
        else block[i] = load_n(rows[i] + c, n);
      }
      transpose(block);
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) {
        if (i < n) __builtin_memcpy(out + (c + i) * kLanes + v * W, &block[i], sizeof(vf));
      }
    }
  }
}

// rows[r][column]: row-major, `count` rows padded with zero rows to `padded`; ld units per row, the tail of a row zero.
template <class Op, class T, class Source>
void pack_rows(int64_t count, int64_t padded, int64_t dim, Source source, typename Op::unit* out, int64_t ld) {
  const int64_t columns = dim / Op::kPer;
  for (int64_t r = 0; r < padded; ++r, out += ld) {
    if (r >= count) {
      std::fill(out, out + ld, typename Op::unit(0));
      continue;
    }
    const T* row = source(r);
    if constexpr (Op::kPer == 2) {
      __builtin_memcpy(out, row, size_t(columns) * 4);
    } else {
      int64_t c = 0;
      for (; c + W <= columns; c += W) store(out + c, load(row + c));
      if (c < columns) store_n(out + c, load_n(row + c, int(columns - c)), int(columns - c));
    }
    std::fill(out + columns, out + ld, typename Op::unit(0));
  }
}

// pairs[r / 2][column]: rows 2i and 2i + 1 interleaved, for sums over rows. Floats: the same as pack_rows.
template <class Op, class T, class Source>
void pack_summed(int64_t count, int64_t padded, int64_t dim, Source source, typename Op::unit* out, int64_t ld) {
  if constexpr (Op::kPer == 1) {
    pack_rows<Op, T>(count, padded, dim, source, out, ld);
  } else {
    for (int64_t r = 0; r < padded; r += 2, out += ld) {
      const T *even = r < count ? source(r) : nullptr, *odd = r + 1 < count ? source(r + 1) : nullptr;
      int64_t c = 0;
      for (; c + W <= dim; c += W) {
        vu pair = even ? load_u16(even + c) : vu{};
        if (odd) pair |= load_u16(odd + c) << 16;
        __builtin_memcpy(out + c, &pair, sizeof pair);
      }
      for (; c < ld; ++c) out[c] = c < dim ? (even ? even[c].bits : 0u) | (odd ? uint32_t(odd[c].bits) << 16 : 0u) : 0u;
    }
  }
}

// target row i ← panel[d][lane] * factor[lane], rounded once.
template <class T>
void unpack_lanes(const Panel& panel, int64_t dim, const float* source, const float* factor, const Rows3& target) {
  for (int v = 0; v < panel.vectors; ++v) {
    const vf scale = load(factor + v * W);
    const int lanes = std::min(W, panel.rows - v * W);
    for (int64_t c = 0; c < dim; c += W) {
      const int n = int(std::min<int64_t>(W, dim - c));
      vf block[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) block[i] = i < n ? load(source + (c + i) * kLanes + v * W) * scale : vf{};
      transpose(block);
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) {
        if (i < lanes) store_n(panel.row<T>(target, v * W + i) + c, block[i], n);
      }
    }
  }
}

// Calls f(op, element): bf16 as pairs where this instruction set multiplies them, everything else widened to float.
template <class F>
LV_INLINE void with_operands(DType dtype, F f) {
  if (dtype == DType::bf16) {
    if constexpr (kBf16Pairs) f(Pairs{}, bf16_t{});
    else f(Floats{}, bf16_t{});
  } else if (dtype == DType::f16) {
    f(Floats{}, f16_t{});
  } else {
    f(Floats{}, float{});
  }
}

// ---------------------------------------------------------------------------------------------------- scratch
// Hands out 64-byte aligned pieces of a thread's buffer; over a null buffer it measures.
struct Arena {
  float* base;
  int64_t used = 0;
  template <class T>
  T* take(int64_t n) {
    static_assert(sizeof(T) == 4, "scratch is handed out in 32-bit words");
    T* out = base == nullptr ? nullptr : reinterpret_cast<T*>(base + used);
    used += round_up(n, 16);
    return out;
  }
};

}  // namespace longvita::LV_ISA
