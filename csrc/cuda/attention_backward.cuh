// The backward kernels of packed attention for sm_90a: row statistics, then dk and dv by tiles of keys, and dq in one of two ways.
//     two passes   dq by tiles of queries, in a kernel of its own. Every gradient element is made by one warpgroup, dS goes from one
//                  product to the next in registers, S and dP are computed twice: seven products
//     single pass  five products: dS goes through shared memory as well, and dq is summed in global memory (attention_single_pass.cuh)
// Everything is added in a fixed order, and bits depend on nothing but the element's own document.
//
// Kernels have one warp that loads and two warpgroups with 64 rows each of a tile of 128. A tile of keys goes through blocks of 64 queries
// of all heads of its group, everything transposed (rows are keys); a tile of queries through blocks of keys.
//     P = exp2(scale2 · q·k − lse2)    dS = P · (g·v − delta)    dv += Pᵀ g    dk += dSᵀ q · scale    dq += dS k · scale
#pragma once
#include "attention_single_pass.cuh"

namespace longvita::cuda {

// -------------------------------------------------------------------------------------------------------------------- row statistics

struct RowsParameters {
  const char *out, *grad;
  int64_t out_token, out_head, grad_token, grad_head;           // strides in elements
  const float *lse, *lse_rest, *grad_lse;                       // grad_lse: null, zeros
  int64_t lse_head, lse_token, grad_lse_head, grad_lse_token;
  Documents documents;          // rows: queries
  float *lse2, *delta;          // (Hq, padded): document d's rows begin at (cu[d] / kStatsRows + d) · kStatsRows
  int64_t padded;
  Sums sums;                    // turns: null, or set to 0
  int heads;
};

constexpr int kRowsThreads = 256;

// lse in log 2 and delta = g·out − g_lse of every query; a row that sees nothing and rows beyond a document get lse2 = ∞: there P is 0.
template <class T, int D> LV_KERNEL(kRowsThreads) rows_kernel(LV_PARAMETERS(RowsParameters) p) {
  constexpr int kLanes = D / 8, kAtOnce = kRowsThreads / kLanes;       // threads a row, 16 bytes each; rows
  const int slot = block() / p.heads, head = block() % p.heads, piece = thread() % kLanes;
  const int document = document_of(p.documents, slot, kStatsRows);
  const Extent rows = extent(p.documents.cu_rows, document, p.documents.rows);
  const int first = larger(slot - rows.start / kStatsRows - document, 0) * kStatsRows;
  if (p.sums.turns && thread() < 2) global_store(p.sums.turns + share_at(p.sums, head, slot, thread()), 0);
  if (first >= rows.length) return;     // an empty slot
  for (int r = thread() / kLanes; r < kStatsRows; r += kAtOnce) {
    const bool inside = first + r < rows.length;
    const int64_t token = rows.start + smaller(first + r, rows.length - 1);
    const Word4 o = global_load(reinterpret_cast<const Word4*>(p.out) + (token * p.out_token + head * p.out_head) / 8 + piece);
    const Word4 g = global_load(reinterpret_cast<const Word4*>(p.grad) + (token * p.grad_token + head * p.grad_head) / 8 + piece);
    const uint32_t a[4] = {o.x, o.y, o.z, o.w}, b[4] = {g.x, g.y, g.z, g.w};
    float sum = 0.0f;
    LV_UNROLL
    for (int i = 0; i < 4; ++i) {
      sum = fused(widen<T>(a[i] & 0xffff), widen<T>(b[i] & 0xffff), sum);
      sum = fused(widen<T>(a[i] >> 16), widen<T>(b[i] >> 16), sum);
    }
    LV_UNROLL
    for (int step = 1; step < kLanes; step *= 2) sum += shuffle_xor(sum, step);
    if (piece != 0) continue;
    const int64_t at = head * p.padded + int64_t(slot) * kStatsRows + r, stat = head * p.lse_head + token * p.lse_token;
    const float lse = global_load(p.lse + stat), rest = global_load(p.lse_rest + stat);
    const bool blind = !inside || lse == -infinity();
    if (p.grad_lse) sum -= global_load(p.grad_lse + head * p.grad_lse_head + token * p.grad_lse_token);
    global_store(p.lse2 + at, blind ? infinity() : fused(lse, kLog2e, rest * kLog2e));
    global_store(p.delta + at, inside ? sum : 0.0f);
  }
}

// ------------------------------------------------------------------------------------------------------------- kernels that multiply

struct BackwardParameters {
  TensorMap mine[2];            // of the tile's rows: k and v, or q and g
  TensorMap theirs[2];          // of the blocks that it goes through: q and g, or k and v
  Documents documents;          // rows: of the tiles
  Schedule schedule;
  Target target[2];             // dk and dv, or dq; data null: not wanted
  const float *lse2, *delta;
  int64_t padded;
  Sums sums;                    // of the single pass
  int heads, group;             // heads of the tiles; query heads a KV head
  float scale, scale2;
  bool add;
};

struct NoSinglePass {};

template <int D, int BLOCK_, int STAGES_, bool SINGLE_ = false> struct BackwardShared {
  static constexpr int BLOCK = BLOCK_, STAGES = STAGES_;
  static constexpr bool SINGLE = SINGLE_;
  Panel<kTile, D> mine[2];
  Panel<BLOCK, D> theirs[STAGES][2];
  std::conditional_t<SINGLE, SinglePass<D>, NoSinglePass> single;
  alignas(16) float lse2[STAGES][kStatsRows], delta[STAGES][kStatsRows];        // of the block's queries, where the blocks are of queries
  TileQueue queue;
  SinglePassBarriers handing_over;
  Barrier mine_full, mine_empty, full[STAGES], empty[STAGES], tail;
};
template <int D, bool SINGLE> using KeysShared = BackwardShared<D, kStatsRows, 3, SINGLE>;
template <int D> using QueriesShared = BackwardShared<D, 128, 2>;
static_assert(sizeof(KeysShared<128, true>) <= kSharedLimit && sizeof(QueriesShared<128>) <= kSharedLimit);

template <class Shared> LV_DEVICE void backward_init(Shared& s) {
  if (thread() == 0) {
    queue_init(s.queue, kConsumerWarps + (Shared::SINGLE ? kAddingWarps : 0));
    if constexpr (Shared::SINGLE) single_pass_init(s.handing_over);
    barrier_init(s.mine_full, 1), barrier_init(s.mine_empty, kConsumerWarps), barrier_init(s.tail, 1);
    for (int i = 0; i < Shared::STAGES; ++i) barrier_init(s.full[i], 1), barrier_init(s.empty[i], kConsumerWarps);
    barriers_ready();
  }
  block_sync();
}

// Rows beyond a document are cleared when they have come (s.tail), before others see them.
template <class Shared, int ROWS, int D>
LV_DEVICE void clear_tail(Shared& s, uint32_t& tail_parity, Panel<ROWS, D> (&panels)[2], int rows, Barrier& full) {
  barrier_wait(s.tail, tail_parity);
  tail_parity ^= 1;
  for (int j = 0; j < 2; ++j) clear_rows(panels[j], rows);
  async_fence();
  warp_sync();
  if (lane() == 0) barrier_arrive(full);
}

// The loading warp. KEYS: tiles of keys, blocks of queries with their statistics, a block of all heads of the group after the other.
template <bool KEYS, int D, class Shared> LV_DEVICE void backward_load(const BackwardParameters& p, Shared& s) {
  Ring<Shared::STAGES> ring;
  uint32_t mine_parity = 1, tail_parity = 0;
  constexpr int kMine = 2 * Panel<kTile, D>::kBytes, kStats = KEYS ? kStatsRows * int(sizeof(float)) : 0;
  constexpr int kTheirs = 2 * Panel<Shared::BLOCK, D>::kBytes + 2 * kStats;
  for (int turn = 0;; ++turn) {
    const Tile tile = take_tile(s.queue, turn, p.documents, p.schedule, p.heads, Shared::BLOCK);
    if (tile.head < 0) return;
    if (tile.count == 0) continue;
    barrier_wait(s.mine_empty, mine_parity);
    mine_parity ^= 1;
    const bool short_tile = Shared::SINGLE && tile.rows - tile.first < kTile;   // dq sums over its rows
    Barrier& mine_full = short_tile ? s.tail : s.mine_full;
    if (lane() == 0) {
      barrier_expect(mine_full, kMine);
      for (int i = 0; i < 2; ++i) load_panel(s.mine[i], p.mine[i], mine_full, tile.head, tile.start_rows + tile.first);
    }
    if (short_tile) clear_tail(s, tail_parity, s.mine, tile.rows - tile.first, s.mine_full);
    const int64_t stats = (int64_t(tile.start_columns / kStatsRows) + tile.document) * kStatsRows;
    for (int i = tile.count - 1; i >= 0; --i) {
      for (int member = 0; member < (KEYS ? p.group : 1); ++member) {
        const int head = KEYS ? tile.head * p.group + member : tile.head / p.group;
        const int start = (tile.begin + i) * Shared::BLOCK, stage = ring.stage;
        const bool ends = tile.columns - start < Shared::BLOCK;
        Barrier& full = ends ? s.tail : s.full[stage];
        barrier_wait(s.empty[stage], ring.parity ^ 1);
        if (lane() == 0) {
          barrier_expect(full, kTheirs);
          for (int j = 0; j < 2; ++j) load_panel(s.theirs[stage][j], p.theirs[j], full, head, tile.start_columns + start);
          if (KEYS) {
            load_bytes(s.lse2[stage], p.lse2 + head * p.padded + stats + start, kStats, full);
            load_bytes(s.delta[stage], p.delta + head * p.padded + stats + start, kStats, full);
          }
        }
        if (ends) clear_tail(s, tail_parity, s.theirs[stage], tile.columns - start, s.full[stage]);
        ring.advance();
      }
    }
  }
}

// --------------------------------------------------------------------------------------------- dk and dv, and dq in the single pass

// Both at once. Their 128 accumulators and 32 operands leave no registers for products of the next block beside them.
template <class T, int D>
LV_DEVICE void add_keys(float (&dk)[D / 2], float (&dv)[D / 2], const uint32_t (&slopes)[kStatsRows / 4],
                        const uint32_t (&weights)[kStatsRows / 4], const Panel<kStatsRows, D> (&theirs)[2]) {
  multiply_add<T>(dv, weights, theirs[1]);
  multiply_add<T>(dk, slopes, theirs[0]);
}

template <class T, int D, bool SINGLE> LV_DEVICE void keys_multiply(const BackwardParameters& p, KeysShared<D, SINGLE>& s, int half) {
  constexpr int N = kStatsRows;
  Ring<KeysShared<D, SINGLE>::STAGES> ring;
  uint32_t mine_parity = 0;
  int step = 0;                 // of all tiles
  for (int turn = 0;; ++turn) {
    const Tile* at = next_tile(s.queue, turn);
    const Tile tile = shared_load(at);
    if (tile.head < 0) return;
    const Span all = seen_by_all<SINGLE>(tile, p.documents, half);
    float dk[D / 2], dv[D / 2], weights[N / 2], slopes[N / 2];
    uint32_t packed_weights[N / 4], packed_slopes[N / 4];
    LV_UNROLL
    for (int i = 0; i < D / 2; ++i) dk[i] = dv[i] = 0.0f;
    if (tile.count > 0) {
      barrier_wait(s.mine_full, mine_parity);
      mine_parity ^= 1;
      int from = (tile.begin + tile.count - 1) * N, member = 0;
      bool behind = false;      // there is a step before this one
      for (int left = tile.count * p.group; left > 0; --left, ++step) {
        const int stage = ring.stage, column = lane() % 4 * 2;
        barrier_wait(s.full[stage], ring.parity);
        multiply_rows<T, N>(weights, s.mine[0], half * 64, s.theirs[stage][0]);
        multiply_rows<T, N>(slopes, s.mine[1], half * 64, s.theirs[stage][1]);
        multiply_wait<1>();     // all but g·v
        if (from < all.low || from + N > all.high) mask_scores<N, SINGLE>(weights, from, shared_load(at), p.documents, half);
        LV_UNROLL
        for (int j = 0; j < N / 8; ++j) {
          const Float2 lse2 = shared_load(reinterpret_cast<const Float2*>(&s.lse2[stage][8 * j + column]));
          LV_UNROLL
          for (int e = 0; e < 4; ++e) weights[4 * j + e] = exp2(fused(weights[4 * j + e], p.scale2, -(e % 2 ? lse2.y : lse2.x)));
        }
        pack_all<T>(weights, packed_weights);
        multiply_wait<0>();
        LV_UNROLL
        for (int j = 0; j < N / 8; ++j) {
          const Float2 delta = shared_load(reinterpret_cast<const Float2*>(&s.delta[stage][8 * j + column]));
          LV_UNROLL
          for (int e = 0; e < 4; ++e) slopes[4 * j + e] = weights[4 * j + e] * (slopes[4 * j + e] - (e % 2 ? delta.y : delta.x));
        }
        pack_all<T>(slopes, packed_slopes);
        if constexpr (SINGLE) put_slopes(s.single, s.handing_over, step, packed_slopes, half);
        if (SINGLE && behind) {
          if constexpr (SINGLE) {
            // In the registers that P had: to an array of its own ptxas gives others, finds too few and serialises all products (C7512).
            float (&dq)[D / 4] = reinterpret_cast<float (&)[D / 4]>(weights);
            multiply_slopes<T>(dq, s.single, s.handing_over, step - 1, s.mine[0], half);
            add_keys<T>(dk, dv, packed_slopes, packed_weights, s.theirs[stage]);
            multiply_wait<2>();
            put_sums(s.single, s.handing_over, step - 1, dq, half);
          }
        } else {
          add_keys<T>(dk, dv, packed_slopes, packed_weights, s.theirs[stage]);
        }
        multiply_wait<0>();     // meanwhile the other warpgroup's products have the tensor cores
        if (lane() == 0) barrier_arrive(s.empty[stage]);
        ring.advance();
        if (++member == p.group) member = 0, from -= N;
        behind = true;
      }
      if constexpr (SINGLE) {
        float dq[D / 4];
        multiply_slopes<T>(dq, s.single, s.handing_over, step - 1, s.mine[0], half);
        multiply_wait<0>();
        put_sums(s.single, s.handing_over, step - 1, dq, half);
      }
      if (lane() == 0) barrier_arrive(s.mine_empty);
    }
    const float scale[2] = {p.scale, p.scale}, one[2] = {1.0f, 1.0f};
    store_tile<T, D>(p.target[0], dk, scale, shared_load(at), half, p.add);
    store_tile<T, D>(p.target[1], dv, one, shared_load(at), half, p.add);
    done_with_tile(s.queue, turn);
  }
}

// -------------------------------------------------------------------------------------------------------------------------------- dq

template <class T, int D> LV_DEVICE void queries_multiply(const BackwardParameters& p, QueriesShared<D>& s, int half) {
  constexpr int N = QueriesShared<D>::BLOCK;
  Ring<QueriesShared<D>::STAGES> ring;
  uint32_t mine_parity = 0;
  for (int turn = 0;; ++turn) {
    const Tile* at = next_tile(s.queue, turn);
    const Tile tile = shared_load(at);
    if (tile.head < 0) return;
    const Span all = seen_by_all(tile, p.documents, half);
    float dq[D / 2], weights[N / 2], slopes[N / 2], lse2[2], delta[2];
    uint32_t packed[N / 4];
    LV_UNROLL
    for (int i = 0; i < D / 2; ++i) dq[i] = 0.0f;
    if (tile.count > 0) {
      const int64_t stats = tile.head * p.padded + (int64_t(tile.start_rows / kStatsRows) + tile.document) * kStatsRows;
      LV_UNROLL
      for (int h = 0; h < 2; ++h) {
        const int row = row_of_thread(tile, half) + 8 * h;
        lse2[h] = row < tile.rows ? global_load(p.lse2 + stats + row) : infinity();
        delta[h] = row < tile.rows ? global_load(p.delta + stats + row) : 0.0f;
      }
      barrier_wait(s.mine_full, mine_parity);
      mine_parity ^= 1;
      for (int i = tile.count - 1; i >= 0; --i) {
        const int from = (tile.begin + i) * N, stage = ring.stage;
        barrier_wait(s.full[stage], ring.parity);
        multiply_rows<T, N>(weights, s.mine[0], half * 64, s.theirs[stage][0]);
        multiply_rows<T, N>(slopes, s.mine[1], half * 64, s.theirs[stage][1]);
        multiply_wait<1>();     // all but g·v
        if (from < all.low || from + N > all.high) mask_scores<N>(weights, from, shared_load(at), p.documents, half);
        LV_UNROLL
        for (int e = 0; e < N / 2; ++e) weights[e] = exp2(fused(weights[e], p.scale2, -lse2[e / 2 % 2]));
        multiply_wait<0>();
        LV_UNROLL
        for (int e = 0; e < N / 2; ++e) slopes[e] = weights[e] * (slopes[e] - delta[e / 2 % 2]);
        pack_all<T>(slopes, packed);
        multiply_add<T>(dq, packed, s.theirs[stage][0]);
        multiply_wait<0>();     // as in keys_multiply
        if (lane() == 0) barrier_arrive(s.empty[stage]);
        ring.advance();
      }
      if (lane() == 0) barrier_arrive(s.mine_empty);
    }
    const float scale[2] = {p.scale, p.scale};
    store_tile<T, D>(p.target[0], dq, scale, shared_load(at), half, p.add);
    done_with_tile(s.queue, turn);
  }
}

template <class T, int D, bool SINGLE> LV_KERNEL(kThreads) keys_kernel(LV_PARAMETERS(BackwardParameters) p) {
  KeysShared<D, SINGLE>& s = shared<KeysShared<D, SINGLE>>();
  backward_init(s);
  if (thread() < 128) {
    registers_give<40>();
    if (thread() < 32) backward_load<true, D>(p, s);
    if constexpr (SINGLE) {
      const int adds = thread() / 32 - 1;
      if (adds >= 0 && adds < kAddingWarps) add_sums(s.single, s.handing_over, s.queue, p.sums, p.documents, p.group, adds);
    }
  } else {
    registers_take<232>();
    keys_multiply<T, D, SINGLE>(p, s, shuffle(thread() / 128 - 1, 0));      // so that ptxas knows: the same in all of a warp
  }
}

template <class T, int D> LV_KERNEL(kThreads) queries_kernel(LV_PARAMETERS(BackwardParameters) p) {
  QueriesShared<D>& s = shared<QueriesShared<D>>();
  backward_init(s);
  if (thread() < 128) {
    registers_give<40>();
    if (thread() < 32) backward_load<false, D>(p, s);
  } else {
    registers_take<232>();
    queries_multiply<T, D>(p, s, thread() / 128 - 1);
  }
}

}  // namespace longvita::cuda
