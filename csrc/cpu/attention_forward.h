// Packed attention, forward: online softmax over key blocks (Dao 2023), one query block of one KV head at a time.
#pragma once
#include "attention_tiles.h"

namespace longvita::LV_ISA {

template <class Op>
struct ForwardScratch {
  using unit = typename Op::unit;
  int64_t panels, keys, dim, ld;
  unit *q, *k, *v;           // panels × [dim / kPer][kLanes]; [keys][ld]; [keys / kPer][ld_v]
  float *out, *scores;       // panels × [dim][kLanes]; [keys][kLanes]
  float *top, *sum, *factor; // per lane: running maximum of the scores, running sum; one panel's rescaling
  int32_t *low, *high;

  ForwardScratch(Arena& arena, int64_t panels_, int64_t keys_, int64_t dim_) : panels(panels_), keys(keys_), dim(dim_) {
    ld = dim / Op::kPer;
    q = arena.take<unit>(panels * ld * kLanes);
    k = arena.take<unit>(keys * ld);
    v = arena.take<unit>(keys / Op::kPer * dim);
    out = arena.take<float>(panels * dim * kLanes);
    scores = arena.take<float>(keys * kLanes);
    top = arena.take<float>(panels * kLanes);
    sum = arena.take<float>(panels * kLanes);
    factor = arena.take<float>(kLanes);
    low = arena.take<int32_t>(panels * kLanes);
    high = arena.take<int32_t>(panels * kLanes);
  }
};

// A probability is 2^(x * (exponent + rest) - m) with x the raw score, or tanh(raw score * in) with a softcap. exponent + rest is the factor
// to twice float's precision: rounded once, its error would be multiplied by the score.
struct Scaling {
  bool capped;
  float in, exponent, rest;
};
inline Scaling scaling_of(const AttentionProblem& p) {
  const double factor = (p.softcap > 0 ? p.softcap : p.scale) * 1.4426950408889634;
  return {p.softcap > 0, p.softcap > 0 ? float(p.scale / p.softcap) : 1.0f, float(factor), float(factor - float(factor))};
}

// Softcap and mask over the rows of scores in a span, key0 being the key of row 0.
inline void cap_and_mask(const Panel& panel, const Span& span, int64_t key0, const Scaling& s, const int32_t* low, const int32_t* high,
                         float* scores) {
  if (s.capped) {
    for (int64_t n = span.begin; n < span.end; ++n) {
      for (int v = 0; v < panel.vectors; ++v) {
        float* x = scores + n * kLanes + v * W;
        store(x, vtanh(load(x) * s.in));
      }
    }
  }
  const auto mask = [&](int64_t begin, int64_t end) {
    for (int v = 0; v < panel.vectors && begin < end; ++v) {
      const vi lo = load_i(low + v * W), hi = load_i(high + v * W);
      for (int64_t n = begin; n < end; ++n) {
        float* x = scores + n * kLanes + v * W;
        store(x, select(visible(int32_t(key0 + n), lo, hi), load(x), splat(-kInf)));
      }
    }
  };
  mask(span.begin, span.clear_begin), mask(span.clear_end, span.end);
}

// Scores of one vector of rows become probabilities (in units, for the product with V). Returns the sum of this span.
template <class Op>
LV_INLINE vf exponentiate(float* scores, int64_t begin, int64_t end, vf scale, vf top) {
  vf total0 = vf{}, total1 = vf{};
  for (int64_t n = begin; n < end; n += 2) {
    float *even = scores + n * kLanes, *odd = even + kLanes;
    const vf p0 = vexp2(load(even) * scale - top), p1 = vexp2(load(odd) * scale - top);
    total0 += p0, total1 += p1;
    if constexpr (Op::kPer == 2) {      // row n / 2: behind what has been read
      const vu packed = pack_pairs(p0, p1);
      __builtin_memcpy(scores + n / 2 * kLanes, &packed, sizeof packed);
    } else {
      store(even, p0), store(odd, p1);
    }
  }
  return total0 + total1;
}

template <class Op>
void forward_panel(const ForwardScratch<Op>& s, const Panel& panel, int64_t index, int64_t key0, const Span& span, const Scaling& scaling,
                   bool first) {
  using unit = typename Op::unit;
  const int64_t rows = span.end - span.begin;
  float* scores = s.scores + span.begin * kLanes;
  product<Op, true>(panel.vectors, rows, s.ld, s.q + index * s.ld * kLanes, kLanes, s.k + span.begin * s.ld, s.ld, scores, kLanes,
                    Into::replace);
  cap_and_mask(panel, span, key0, scaling, s.low + index * kLanes, s.high + index * kLanes, s.scores);

  for (int v = 0; v < panel.vectors; ++v) {
    float *top_p = s.top + index * kLanes + v * W, *sum_p = s.sum + index * kLanes + v * W, *x = scores + v * W;
    vf peak = load(x), other = load(x + kLanes);
    for (int64_t n = 2; n < rows; n += 2) peak = vmax(peak, load(x + n * kLanes)), other = vmax(other, load(x + (n + 1) * kLanes));
    const vf before = first ? splat(-kInf) : load(top_p);
    const vf top = vmax(before, vmax(peak, other));
    const vf safe = select((vi)(top == -kInf), vf{}, top) * scaling.exponent;       // rows that have seen nothing: 2^(−inf − 0) = 0
    const vf sum = exponentiate<Op>(x, 0, rows, splat(scaling.exponent), safe);
    const vf factor = vexp2(select((vi)(before == -kInf), before, before * scaling.exponent) - safe);
    store(sum_p, first ? sum : load(sum_p) * factor + sum);
    store(top_p, top);
    store(s.factor + v * W, factor);
  }
  product<Op, false>(panel.vectors, s.dim, rows / Op::kPer, reinterpret_cast<const unit*>(scores), kLanes,
                     s.v + span.begin / Op::kPer * s.dim, s.dim, s.out + index * s.dim * kLanes, kLanes,
                     first ? Into::replace : Into::rescale, s.factor);
}

// lse + rest = ln 2 · (top · (exponent + rest) + log2(sum)), in double: the backward lives on its last bits.
struct LogSumExp { vf lse, rest; };
LV_INLINE LogSumExp log_sum_exp(vf top, vf sum, const Scaling& s) {
  typedef double vd __attribute__((vector_size(W * 8)));
  const vf rounded = top * s.exponent;      // what the probabilities were taken relative to
  vf log2_sum = vlog2_fraction(sum);
  const vd whole = __builtin_convertvector(vlog2_whole(sum), vd);
  const vd total = __builtin_convertvector(rounded, vd) + __builtin_convertvector(top, vd) * double(s.rest) + whole +
                   __builtin_convertvector(log2_sum, vd);
  const vd exact = total * 0.6931471805599453094;
  const vf lse = __builtin_convertvector(exact, vf);
  return {lse, __builtin_convertvector(exact - __builtin_convertvector(lse, vd), vf)};
}

template <class T>
void finish_panel(const AttentionForward& f, const Panel& panel, const Scaling& scaling, const float* top, float* sum, const float* out,
                  bool untouched) {
  const AttentionProblem& p = f.p;
  float lse[kLanes], rest[kLanes];
  for (int v = 0; v < panel.vectors; ++v) {
    const vf total = untouched ? vf{} : load(sum + v * W);
    const vi nothing = (vi)(total == 0.0f);
    const LogSumExp found = log_sum_exp(select(nothing, vf{}, load(top + v * W)), total, scaling);
    store(lse + v * W, select(nothing, splat(-kInf), found.lse));
    store(rest + v * W, select(nothing, vf{}, found.rest));
    store(sum + v * W, select(nothing, vf{}, 1.0f / total));
  }
  for (int i = 0; i < panel.rows; ++i) {
    const int64_t at = panel.head[i] * p.q.tokens + panel.token[i];
    f.lse[at] = lse[i], f.lse_rest[at] = rest[i];
  }
  if (untouched) {
    for (int i = 0; i < panel.rows; ++i) std::fill_n(reinterpret_cast<char*>(panel.row<T>(f.out, i)), size_t(p.dim()) * sizeof(T), char(0));
  } else {
    unpack_lanes<T>(panel, p.dim(), out, sum, f.out);
  }
}

template <class Op, class T>
void forward_block(const AttentionForward& f, const Unit& u, int64_t row_begin, int64_t row_end, int64_t block, const ForwardScratch<Op>& s) {
  const AttentionProblem& p = f.p;
  const int64_t dim = p.dim();
  const Scaling scaling = scaling_of(p);
  Panel panels[kMaxPanels];
  bool first[kMaxPanels];
  int count = 0;
  int64_t key_begin = u.keys(), key_end = 0;
  for (int64_t row = row_begin; row < row_end; row += kLanes, ++count) {
    panels[count] = make_panel(p, u, row, s.low + count * kLanes, s.high + count * kLanes);
    first[count] = true;
    if (panels[count].max_high == 0) continue;      // nothing to see
    key_begin = std::min<int64_t>(key_begin, panels[count].min_low), key_end = std::max<int64_t>(key_end, panels[count].max_high);
    pack_lanes<Op, T>(panels[count], p.q, dim, s.q + count * s.ld * kLanes);
  }
  const auto key_row = [&](const Rows3& x, int64_t n) {
    return reinterpret_cast<const T*>(x.data) + (u.k0 + n) * x.stride_token + u.head * x.stride_head;
  };
  // Key blocks begin at multiples of their length in the document: the order of a row's sums must not depend on the rows beside it.
  for (int64_t key0 = key_begin / block * block; key0 < key_end; key0 += block) {
    const int64_t keys = std::min(block, key_end - key0), padded = round_up(keys, kBroadcast);
    pack_rows<Op, T>(keys, padded, dim, [&](int64_t n) { return key_row(p.k, key0 + n); }, s.k, s.ld);
    pack_summed<Op, T>(keys, padded, dim, [&](int64_t n) { return key_row(p.v, key0 + n); }, s.v, dim);
    for (int i = 0; i < count; ++i) {
      const Span span = span_of(panels[i], key0, keys);
      if (span.empty()) continue;
      forward_panel<Op>(s, panels[i], i, key0, span, scaling, first[i]);
      first[i] = false;
    }
  }
  for (int i = 0; i < count; ++i) {
    const auto finish = p.result == DType::f32 ? &finish_panel<float> : &finish_panel<T>;
    finish(f, panels[i], scaling, s.top + i * kLanes, s.sum + i * kLanes, s.out + i * dim * kLanes, first[i]);
  }
}

}  // namespace longvita::LV_ISA
