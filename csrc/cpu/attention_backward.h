// Packed attention, backward. Recomputes the probabilities from lse; fp32 sums; all three gradients in one pass (five products).
//
// A task owns a *partition* of the keys of one KV head of one document: their K, V, dk and dv stay in cache while the query blocks pass by,
// last block first. What a query block gets from this partition is added to its dq. A block that several partitions reach takes their
// shares in the order of the partitions, whoever computes them: a task waits until the one before it has added its share. So the result
// does not depend on the number of threads. (Tasks start in the order of the partitions: the one waited for is always running or done.)
#pragma once
#include <sched.h>
#include <time.h>

#include "attention_forward.h"
#include "parallel.h"

namespace longvita::LV_ISA {

template <class Op>
struct BackwardScratch {
  using unit = typename Op::unit;
  int64_t panels, partition, keys, dim, ld, wide;
  // Of the query block, by panel: transposed q and g = grad_out; the same row-major, for the sums over queries.
  unit *q, *g, *q_rows, *g_rows;
  float *grad_q, *lse, *lse_rest, *delta;       // panels × [dim][kLanes]; panels × [kLanes]
  int32_t *low, *high;
  // Of the partition: [partition][ld]; keys summed over for dq; [partition][wide].
  unit *k, *v, *k_summed;
  float *grad_k, *grad_v;
  // Of one panel and one key block: S and dP, [keys][kLanes]; with Floats they become P and dS in place.
  float *scores, *grads;
  unit *p_rows, *ds_rows, *ds_lanes;            // Pairs: P and dS as bf16 [keys][kLanes], dS in pairs of keys [keys / 2][kLanes]

  BackwardScratch(Arena& arena, int64_t panels_, int64_t partition_, int64_t keys_, int64_t dim_)
      : panels(panels_), partition(partition_), keys(keys_), dim(dim_) {
    ld = dim / Op::kPer, wide = round_up(dim, W);
    q = arena.take<unit>(panels * ld * kLanes);
    g = arena.take<unit>(panels * ld * kLanes);
    q_rows = arena.take<unit>(panels * kLanes / Op::kPer * wide);
    g_rows = arena.take<unit>(panels * kLanes / Op::kPer * wide);
    grad_q = arena.take<float>(panels * dim * kLanes);
    lse = arena.take<float>(panels * kLanes);
    lse_rest = arena.take<float>(panels * kLanes);
    delta = arena.take<float>(panels * kLanes);
    low = arena.take<int32_t>(panels * kLanes);
    high = arena.take<int32_t>(panels * kLanes);
    k = arena.take<unit>(partition * ld);
    v = arena.take<unit>(partition * ld);
    k_summed = Op::kPer == 2 ? arena.take<unit>(partition / 2 * dim) : k;
    grad_k = arena.take<float>(partition * wide);
    grad_v = arena.take<float>(partition * wide);
    scores = arena.take<float>(keys * kLanes);
    grads = arena.take<float>(keys * kLanes);
    if (Op::kPer == 2) {
      p_rows = arena.take<unit>(keys * kLanes / 2);
      ds_rows = arena.take<unit>(keys * kLanes / 2);
      ds_lanes = arena.take<unit>(keys * kLanes / 2);
    } else {
      p_rows = reinterpret_cast<unit*>(scores), ds_rows = ds_lanes = reinterpret_cast<unit*>(grads);
    }
  }
};

struct Wanted { bool q, kv; };

// delta = g · out. In eight sums, because what follows is dP − delta: its rounding errors stand in every dS of the row.
template <class Op>
void row_deltas(const Panel& panel, int64_t units, const typename Op::unit* g, const typename Op::unit* out, float* delta) {
  constexpr int kSums = 8;
  for (int v = 0; v < panel.vectors; ++v) {
    vf sum[kSums] = {};
    for (int64_t r = 0; r < units; r += kSums / Op::kPer) {      // dim is a multiple of 8
#pragma GCC unroll 8
      for (int i = 0; i < kSums / Op::kPer; ++i) {
        const int64_t at = (r + i) * kLanes + v * W;
        sum[i] = Op::mad(sum[i], Op::load_units(g + at), Op::load_units(out + at));
      }
    }
    store(delta + v * W, ((sum[0] + sum[4]) + (sum[1] + sum[5])) + ((sum[2] + sum[6]) + (sum[3] + sum[7])));
  }
}

// Subtracts grad_lse from delta; the lse in log2 units as lse + rest. A row that saw nothing gets lse +inf: its probabilities are 0.
inline void row_statistics(const AttentionBackward& b, const Panel& panel, float* lse, float* rest, float* delta) {
  for (int i = 0; i < panel.vectors * W; ++i) {
    lse[i] = rest[i] = 0.0f;
    if (i >= panel.rows) continue;
    const int64_t head = panel.head[i], token = panel.token[i], at = head * b.lse_stride_head + token * b.lse_stride_token;
    if (b.lse[at] == -kInf) {
      lse[i] = kInf, delta[i] = 0.0f;
      continue;
    }
    const double log2_units = (double(b.lse[at]) + b.lse_rest[at]) * 1.4426950408889634;
    lse[i] = float(log2_units), rest[i] = float(log2_units - lse[i]);
    if (b.grad_lse != nullptr) delta[i] -= b.grad_lse[head * b.grad_lse_stride_head + token * b.grad_lse_stride_token];
  }
}

template <class Op, class T>
Panel load_panel(const AttentionBackward& b, const Unit& u, int64_t row0, int64_t index, const BackwardScratch<Op>& s, Wanted want) {
  const Panel panel = make_panel(b.p, u, row0, s.low + index * kLanes, s.high + index * kLanes);
  if (want.q) std::fill_n(s.grad_q + index * s.dim * kLanes, s.dim * kLanes, 0.0f);
  if (panel.max_high == 0) return panel;      // sees nothing
  typename Op::unit *q = s.q + index * s.ld * kLanes, *g = s.g + index * s.ld * kLanes;
  pack_lanes<Op, T>(panel, b.grad_out, s.dim, g);
  pack_lanes<Op, T>(panel, b.out, s.dim, q);      // only for the next line
  row_deltas<Op>(panel, s.ld, g, q, s.delta + index * kLanes);
  row_statistics(b, panel, s.lse + index * kLanes, s.lse_rest + index * kLanes, s.delta + index * kLanes);
  pack_lanes<Op, T>(panel, b.p.q, s.dim, q);
  if (want.kv) {
    const int64_t at = index * (kLanes / Op::kPer) * s.wide, padded = round_up(panel.rows, 2);
    pack_summed<Op, T>(panel.rows, padded, s.dim, [&](int64_t i) { return panel.row<const T>(b.p.q, int(i)); }, s.q_rows + at, s.wide);
    pack_summed<Op, T>(panel.rows, padded, s.dim, [&](int64_t i) { return panel.row<const T>(b.grad_out, int(i)); }, s.g_rows + at, s.wide);
  }
  return panel;
}

template <class Op, class T>
void load_partition(const AttentionBackward& b, const Unit& u, int64_t key0, int64_t keys, const BackwardScratch<Op>& s, Wanted want) {
  const int64_t padded = round_up(keys, kBroadcast);
  const auto row = [&](const Rows3& x, int64_t n) {
    return reinterpret_cast<const T*>(x.data) + (u.k0 + key0 + n) * x.stride_token + u.head * x.stride_head;
  };
  pack_rows<Op, T>(keys, padded, s.dim, [&](int64_t n) { return row(b.p.k, n); }, s.k, s.ld);
  pack_rows<Op, T>(keys, padded, s.dim, [&](int64_t n) { return row(b.p.v, n); }, s.v, s.ld);
  if (want.q && Op::kPer == 2) pack_summed<Op, T>(keys, padded, s.dim, [&](int64_t n) { return row(b.p.k, n); }, s.k_summed, s.dim);
  if (want.kv) {
    std::fill_n(s.grad_k, padded * s.wide, 0.0f);
    std::fill_n(s.grad_v, padded * s.wide, 0.0f);
  }
}

// S and dP of one vector of rows become P and dS.
template <class Op, bool Capped, bool Masked>
void differentiate(const BackwardScratch<Op>& s, int v, const Span& span, int64_t key0, const Scaling& scaling, vf lse, vf rest, vf delta,
                   vi low, vi high) {
  const auto one = [&](int64_t n, vf& p, vf& ds) {
    vf x = load(s.scores + n * kLanes + v * W), slope = splat(1.0f);
    if constexpr (Capped) {
      const vf t = vtanh(x * scaling.in);
      slope = 1.0f - t * t, x = t;
    }
    p = vexp2((x * scaling.exponent - lse) + (x * scaling.rest - rest));
    if constexpr (Masked) p = select(visible(int32_t(key0 + n), low, high), p, vf{});
    ds = p * (load(s.grads + n * kLanes + v * W) - delta);
    if constexpr (Capped) ds *= slope;
  };
  for (int64_t n = span.begin; n < span.end; n += 2) {
    vf p0, p1, ds0, ds1;
    one(n, p0, ds0), one(n + 1, p1, ds1);
    if constexpr (Op::kPer == 2) {
      bf16_t *p_rows = reinterpret_cast<bf16_t*>(s.p_rows), *ds_rows = reinterpret_cast<bf16_t*>(s.ds_rows);
      store(p_rows + n * kLanes + v * W, p0), store(p_rows + (n + 1) * kLanes + v * W, p1);
      store(ds_rows + n * kLanes + v * W, ds0), store(ds_rows + (n + 1) * kLanes + v * W, ds1);
      const vu packed = pack_pairs(ds0, ds1);
      __builtin_memcpy(s.ds_lanes + n / 2 * kLanes + v * W, &packed, sizeof packed);
    } else {
      store(s.scores + n * kLanes + v * W, p0), store(s.scores + (n + 1) * kLanes + v * W, p1);
      store(s.grads + n * kLanes + v * W, ds0), store(s.grads + (n + 1) * kLanes + v * W, ds1);
    }
  }
}

// One panel against one key block; base: where the block begins in the partition.
template <class Op>
void backward_panel(const BackwardScratch<Op>& s, const Panel& panel, int64_t index, int64_t key0, int64_t base, const Span& span,
                    const Scaling& scaling, Wanted want) {
  const int64_t rows = span.end - span.begin, panel_size = s.ld * kLanes, key = base + span.begin;
  product<Op, true>(panel.vectors, rows, s.ld, s.q + index * panel_size, kLanes, s.k + key * s.ld, s.ld, s.scores + span.begin * kLanes,
                    kLanes, Into::replace);
  product<Op, true>(panel.vectors, rows, s.ld, s.g + index * panel_size, kLanes, s.v + key * s.ld, s.ld, s.grads + span.begin * kLanes,
                    kLanes, Into::replace);
  for (int v = 0; v < panel.vectors; ++v) {
    const int64_t lane = index * kLanes + v * W;
    const vf lse = load(s.lse + lane), rest = load(s.lse_rest + lane), delta = load(s.delta + lane);
    const vi low = load_i(s.low + lane), high = load_i(s.high + lane);
    if (scaling.capped && span.masked()) differentiate<Op, true, true>(s, v, span, key0, scaling, lse, rest, delta, low, high);
    else if (scaling.capped) differentiate<Op, true, false>(s, v, span, key0, scaling, lse, rest, delta, low, high);
    else if (span.masked()) differentiate<Op, false, true>(s, v, span, key0, scaling, lse, rest, delta, low, high);
    else differentiate<Op, false, false>(s, v, span, key0, scaling, lse, rest, delta, low, high);
  }
  if (want.q) {
    product<Op, false>(panel.vectors, s.dim, rows / Op::kPer, s.ds_lanes + span.begin / Op::kPer * kLanes, kLanes,
                       s.k_summed + key / Op::kPer * s.dim, s.dim, s.grad_q + index * s.dim * kLanes, kLanes, Into::add);
  }
  if (want.kv) {
    const int64_t columns = kLanes / Op::kPer, size = index * columns * s.wide, summed = round_up(panel.rows, 2) / Op::kPer;
    product<Op, true>(s.wide / W, rows, summed, s.g_rows + size, s.wide, s.p_rows + span.begin * columns, columns,
                      s.grad_v + key * s.wide, s.wide, Into::add);
    product<Op, true>(s.wide / W, rows, summed, s.q_rows + size, s.wide, s.ds_rows + span.begin * columns, columns,
                      s.grad_k + key * s.wide, s.wide, Into::add);
  }
}

template <class T>
void write_keys(const AttentionBackward& b, const Unit& u, int64_t key0, int64_t keys, const float* source, int64_t wide, float factor,
                char* target) {
  if (target == nullptr) return;
  const int64_t dim = b.p.dim();
  for (int64_t n = 0; n < keys; ++n) {
    T* row = reinterpret_cast<T*>(target) + ((u.k0 + key0 + n) * b.p.kv_heads() + u.head) * dim;
    for (int64_t c = 0; c < dim; c += W) store_n(row + c, load(source + n * wide + c) * factor, int(std::min<int64_t>(W, dim - c)));
  }
}

// Adds a panel's share of dq to what earlier partitions left in `partial` (row-major fp32, where not the first), and leaves it there, or, as
// the last, scales and rounds it into grad_q.
template <class T>
void add_grad_q(const AttentionBackward& b, const Panel& panel, const float* share, int64_t dim, bool first, bool last) {
  const float scale = float(b.p.scale);
  for (int v = 0; v < panel.vectors; ++v) {
    const int lanes = std::min(W, panel.rows - v * W);
    int64_t offset[W];
    for (int i = 0; i < lanes; ++i) offset[i] = (panel.token[v * W + i] * b.p.q.heads + panel.head[v * W + i]) * dim;
    for (int64_t c = 0; c < dim; c += W) {
      const int n = int(std::min<int64_t>(W, dim - c));
      vf block[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) block[i] = i < n ? load(share + (c + i) * kLanes + v * W) : vf{};
      transpose(block);
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) {
        if (i >= lanes) continue;
        const vf sum = first ? block[i] : block[i] + load_n(b.partial + offset[i] + c, n);
        if (last) store_n(reinterpret_cast<T*>(b.grad_q) + offset[i] + c, sum * scale, n);
        else store_n(b.partial + offset[i] + c, sum, n);
      }
    }
  }
}

// Waits until another thread has reached `value`: first polls, because it may be about to; then yields, because it may need this core; then
// sleeps, because the system moves a preempted thread to a core that is idle.
inline void wait_for(const int32_t* progress, int32_t value) {
  constexpr int kPauses = 1000, kYields = 100;      // 10 to 50 µs, and about as long again
  constexpr timespec kNap = {0, 50'000};
  for (int looks = 0; __atomic_load_n(progress, __ATOMIC_ACQUIRE) < value; ++looks) {
    if (looks < kPauses) pause_core();
    else if (looks < kPauses + kYields) sched_yield();
    else nanosleep(&kNap, nullptr);
  }
}

// Partition `part` of the keys of one unit, about `keys` at a time, against all its query blocks.
template <class Op, class T>
void backward_partition(const AttentionBackward& b, const Unit& u, int64_t part, int32_t* progress, int64_t keys,
                        const BackwardScratch<Op>& s) {
  const Scaling scaling = scaling_of(b.p);
  const Wanted want = {b.grad_q != nullptr, b.grad_k != nullptr || b.grad_v != nullptr};
  const int64_t partition = partition_of(u.keys()), key_begin = part * partition, key_count = std::min(partition, u.keys() - key_begin);
  const int64_t block = s.panels * kLanes;
  const bool fp32 = b.p.result == DType::f32;
  const auto add = fp32 ? &add_grad_q<float> : &add_grad_q<T>;
  keys = even_piece(key_count, keys);
  Panel panels[kMaxPanels];
  load_partition<Op, T>(b, u, key_begin, key_count, s, want);
  for (int64_t i = (u.rows() + block - 1) / block - 1; i >= 0; --i) {
    const int64_t row_begin = i * block, row_end = std::min(u.rows(), row_begin + block);
    // what the block sees; limits grow with the position
    const int64_t low = limits_of(b.p, u, row_begin / u.group).low, high = limits_of(b.p, u, (row_end - 1) / u.group).high;
    const int64_t first = high == 0 ? 0 : low / partition, last = high == 0 ? 0 : (high - 1) / partition;
    if (part < first || part > last) continue;
    int count = 0;
    for (int64_t row = row_begin; row < row_end; row += kLanes, ++count) panels[count] = load_panel<Op, T>(b, u, row, count, s, want);
    for (int64_t base = 0; base < key_count; base += keys) {
      for (int p = 0; p < count; ++p) {
        const Span span = span_of(panels[p], key_begin + base, std::min(keys, key_count - base));
        if (!span.empty()) backward_panel<Op>(s, panels[p], p, key_begin + base, base, span, scaling, want);
      }
    }
    if (!want.q) continue;
    if (part > first) wait_for(progress + i, int32_t(part - first));
    for (int p = 0; p < count; ++p) add(b, panels[p], s.grad_q + p * s.dim * kLanes, s.dim, part == first, part == last);
    if (part < last) __atomic_store_n(progress + i, int32_t(part - first + 1), __ATOMIC_RELEASE);
  }
  if (want.kv) {
    const auto write = fp32 ? &write_keys<float> : &write_keys<T>;
    write(b, u, key_begin, key_count, s.grad_k, s.wide, float(b.p.scale), b.grad_k);
    write(b, u, key_begin, key_count, s.grad_v, s.wide, 1.0f, b.grad_v);
  }
}

}  // namespace longvita::LV_ISA
