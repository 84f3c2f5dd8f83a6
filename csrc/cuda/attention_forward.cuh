// The forward kernel of packed attention for sm_90a: tiles of 128 queries of one head and document over blocks of 128 keys.
//
// One warp loads (K and V in rings of two blocks, Q ahead for the next tile); two warpgroups have 64 queries each. Of a warpgroup's two
// products a block, S = q·kᵀ of the next block is issued together with out += P·v of the present one, so that the softmax of S runs beside
// P·v; and the warpgroups take turns in issuing products, so that the softmax of one runs beside the products of the other.
//
// Scores are kept in units of log 2: P = exp2(scale2 · q·k − peak). Blocks are taken from the last to the first: in a causal tile the
// blocks that need a mask come first, and the peak is close to final from the start.
#pragma once
#include "attention_tiles.cuh"

namespace longvita::cuda {

constexpr int kKeys = 128, kStages = 2;
constexpr int kTurn = 1;                // named barriers 1 and 2: whose turn it is to issue products
// A peak is kept until a row's scores exceed it by this much (in log 2): P then stays below 2⁸, exact as ever in floating point, and sums
// are rarely rescaled. Each row decides for itself, so that no row's bits depend on another's.
constexpr float kSlack = 8.0f;

struct ForwardParameters {
  TensorMap q, k, v;
  Documents documents;
  Schedule schedule;
  Target out;
  float* lse;
  float* lse_rest;
  int heads, group;
  float scale2;                 // scale · log₂ e, positive
};

template <int D> struct ForwardShared {
  Panel<kTile, D> q;
  Panel<kKeys, D> k[kStages], v[kStages];
  TileQueue queue;
  Barrier q_full, q_empty, k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages], tail;
};
static_assert(sizeof(ForwardShared<128>) <= kSharedLimit);

template <int D> LV_DEVICE void forward_load(const ForwardParameters& p, ForwardShared<D>& s) {
  Ring<kStages> k_ring, v_ring;
  uint32_t q_parity = 1, tail_parity = 0;
  for (int turn = 0;; ++turn) {
    const Tile tile = take_tile(s.queue, turn, p.documents, p.schedule, p.heads, kKeys);
    if (tile.head < 0) return;
    if (tile.count == 0) continue;
    const int kv_head = tile.head / p.group;
    barrier_wait(s.q_empty, q_parity);
    q_parity ^= 1;
    if (lane() == 0) load_alone(s.q, p.q, s.q_full, tile.head, tile.start_rows + tile.first);
    for (int i = 0; i <= tile.count; ++i) {     // the keys of a block, then the values of the block before
      if (i < tile.count) {
        barrier_wait(s.k_empty[k_ring.stage], k_ring.parity ^ 1);
        const int start = (tile.begin + tile.count - 1 - i) * kKeys;
        if (lane() == 0) load_alone(s.k[k_ring.stage], p.k, s.k_full[k_ring.stage], kv_head, tile.start_columns + start);
        k_ring.advance();
      }
      if (i > 0) {
        barrier_wait(s.v_empty[v_ring.stage], v_ring.parity ^ 1);
        const int start = (tile.begin + tile.count - i) * kKeys;
        const bool ends = tile.columns - start < kKeys;
        Barrier& full = ends ? s.tail : s.v_full[v_ring.stage];
        if (lane() == 0) load_alone(s.v[v_ring.stage], p.v, full, kv_head, tile.start_columns + start);
        if (ends) {             // masked keys have P = 0, but the next document's values may be infinite: the copy goes by this warp first
          barrier_wait(s.tail, tail_parity);
          tail_parity ^= 1;
          clear_rows(s.v[v_ring.stage], tile.columns - start);
          async_fence();
          warp_sync();
          if (lane() == 0) barrier_arrive(s.v_full[v_ring.stage]);
        }
        v_ring.advance();
      }
    }
  }
}

// Softmax of the two rows a thread has a part of: row `lane / 4` of its warp's sixteen and the one eight further.
struct Softmax {
  float peak[2], total[2];      // total: of this thread's columns, relative to 2 ** peak
  float shrink[2];              // what sums from before the last block must be multiplied with

  LV_DEVICE void begin() {
    LV_UNROLL
    for (int h = 0; h < 2; ++h) peak[h] = -infinity(), total[h] = 0.0f, shrink[h] = 1.0f;
  }

  // Scores become P. True if a row of the warp has a new peak, so that `shrink` must be applied.
  LV_DEVICE bool block(float (&scores)[kKeys / 2], float scale2) {
    bool grew = false;
    LV_UNROLL
    for (int h = 0; h < 2; ++h) {
      float top = -infinity();
      LV_UNROLL
      for (int j = 0; j < kKeys / 8; ++j) top = maximum(top, maximum(scores[4 * j + 2 * h], scores[4 * j + 2 * h + 1]));
      top = maximum(top, shuffle_xor(top, 1));
      top = maximum(top, shuffle_xor(top, 2)) * scale2;
      const bool grows = top > peak[h] + kSlack;
      shrink[h] = grows ? exp2(peak[h] - top) : 1.0f;
      peak[h] = grows ? top : peak[h];
      grew |= grows;
      const float base = peak[h] == -infinity() ? 0.0f : peak[h];       // nothing seen yet
      float sum = 0.0f;
      LV_UNROLL
      for (int j = 0; j < kKeys / 8; ++j) {
        LV_UNROLL
        for (int e = 0; e < 2; ++e) {
          float& x = scores[4 * j + 2 * h + e];
          x = exp2(fused(x, scale2, -base));
          sum += x;
        }
      }
      total[h] = total[h] * shrink[h] + sum;
    }
    return warp_any(grew);
  }

  template <int N> LV_DEVICE void rescale(float (&out)[N]) const {
    LV_UNROLL
    for (int i = 0; i < N; ++i) out[i] *= shrink[i / 2 % 2];
  }
};

template <class T, int D>
LV_DEVICE void forward_store(const ForwardParameters& p, const Tile& tile, int half, const Softmax& softmax, const float (&out)[D / 2]) {
  const int row = row_of_thread(tile, half);
  float factor[2];
  LV_UNROLL
  for (int h = 0; h < 2; ++h) {
    float total = softmax.total[h];
    total += shuffle_xor(total, 1);
    total += shuffle_xor(total, 2);
    const bool blind = total == 0.0f;
    factor[h] = blind ? 0.0f : 1.0f / total;
    const float peak = blind ? 0.0f : softmax.peak[h], logarithm = blind ? 0.0f : log2(total);
    const float lse = (peak + logarithm) * kLn2;
    // what rounding took: fused() has lse · log₂e exactly before it subtracts
    const float rest = (logarithm - fused(lse, kLog2e, -peak)) * kLn2;
    if (lane() % 4 == 0 && row + 8 * h < tile.rows) {
      const int64_t at = int64_t(tile.head) * p.documents.rows + tile.start_rows + row + 8 * h;
      global_store(p.lse + at, blind ? -infinity() : lse);
      global_store(p.lse_rest + at, blind ? 0.0f : rest);
    }
  }
  store_tile<T, D>(p.out, out, factor, tile, half, false);
}

template <class T, int D> LV_DEVICE void forward_multiply(const ForwardParameters& p, ForwardShared<D>& s, int half) {
  constexpr int kBoth = 256;
  Ring<kStages> k_ring, v_ring;
  uint32_t q_parity = 0;
  if (half == 1) named_arrive(kTurn, kBoth);    // the first half begins
  for (int turn = 0;; ++turn) {
    const Tile* at = next_tile(s.queue, turn);
    const Tile tile = shared_load(at);
    if (tile.head < 0) return;
    const Span all = seen_by_all(tile, p.documents, half);
    float out[D / 2], scores[kKeys / 2];
    uint32_t weights[kKeys / 4];
    Softmax softmax;
    softmax.begin();
    LV_UNROLL
    for (int i = 0; i < D / 2; ++i) out[i] = 0.0f;
    if (tile.count > 0) {
      int from = (tile.begin + tile.count - 1) * kKeys;
      barrier_wait(s.q_full, q_parity);
      q_parity ^= 1;
      barrier_wait(s.k_full[k_ring.stage], k_ring.parity);
      multiply_rows<T, kKeys>(scores, s.q, half * 64, s.k[k_ring.stage]);
      multiply_wait<0>();
      if (lane() == 0) barrier_arrive(s.k_empty[k_ring.stage]);
      k_ring.advance();
      if (from < all.low || from + kKeys > all.high) mask_scores<kKeys>(scores, from, shared_load(at), p.documents, half);
      softmax.block(scores, p.scale2);
      pack_all<T>(scores, weights);
      for (int i = 1; i < tile.count; ++i) {
        from -= kKeys;
        barrier_wait(s.k_full[k_ring.stage], k_ring.parity);
        named_sync(kTurn + half, kBoth);
        multiply_rows<T, kKeys>(scores, s.q, half * 64, s.k[k_ring.stage]);
        barrier_wait(s.v_full[v_ring.stage], v_ring.parity);
        multiply_add<T>(out, weights, s.v[v_ring.stage]);
        named_arrive(kTurn + (half ^ 1), kBoth);
        multiply_wait<1>();
        if (lane() == 0) barrier_arrive(s.k_empty[k_ring.stage]);
        k_ring.advance();
        if (from < all.low || from + kKeys > all.high) mask_scores<kKeys>(scores, from, shared_load(at), p.documents, half);
        const bool grew = softmax.block(scores, p.scale2);
        multiply_wait<0>();
        if (lane() == 0) barrier_arrive(s.v_empty[v_ring.stage]);
        v_ring.advance();
        pack_all<T>(scores, weights);
        if (grew) softmax.rescale(out);
      }
      if (lane() == 0) barrier_arrive(s.q_empty);
      barrier_wait(s.v_full[v_ring.stage], v_ring.parity);
      multiply_add<T>(out, weights, s.v[v_ring.stage]);
      multiply_wait<0>();
      if (lane() == 0) barrier_arrive(s.v_empty[v_ring.stage]);
      v_ring.advance();
    }
    forward_store<T, D>(p, shared_load(at), half, softmax, out);
    done_with_tile(s.queue, turn);
  }
}

template <class T, int D> LV_KERNEL(kThreads) forward_kernel(LV_PARAMETERS(ForwardParameters) p) {
  ForwardShared<D>& s = shared<ForwardShared<D>>();
  if (thread() == 0) {
    prefetch_map(p.q), prefetch_map(p.k), prefetch_map(p.v);
    queue_init(s.queue);
    barrier_init(s.q_full, 1), barrier_init(s.q_empty, kConsumerWarps), barrier_init(s.tail, 1);
    for (int i = 0; i < kStages; ++i) {
      barrier_init(s.k_full[i], 1), barrier_init(s.k_empty[i], kConsumerWarps);
      barrier_init(s.v_full[i], 1), barrier_init(s.v_empty[i], kConsumerWarps);
    }
    barriers_ready();
  }
  block_sync();
  if (thread() < 128) {
    registers_give<40>();
    if (thread() < 32) forward_load(p, s);
  } else {
    registers_take<232>();
    forward_multiply<T>(p, s, thread() / 128 - 1);
  }
}

}  // namespace longvita::cuda
