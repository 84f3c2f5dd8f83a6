// dq in the same pass as dk and dv: what the kernel over tiles of keys does besides (attention_backward.cuh).
//
// dS of both warpgroups meets in shared memory, as 128 keys × 64 queries. dq (64, D) = dS · k is made by both, half of the columns each,
// one step behind dk and dv: a warpgroup does not wait for the dS that the other one is at, so exponentials of one run beside products of
// the other. Its accumulators go as they lie to float32 sums in global memory, added by the copy engine; sums_kernel makes dq of the sums.
//
// Order. Tiles of a document and KV head add to a block of queries in the order of their keys, so bits do not depend on who is faster.
// They are taken in that order too (schedule_kernel, `ascending`), so a tile waits only for tiles that were taken before it; of all
// unfinished tiles the one taken first waits for nobody, so there is always one that goes on. Both ends of what a tile sees rise along a
// document, so the tiles that see a block are neighbours, and a tile's turn is its distance from the first of them.
// All go through their blocks from the last to the first: tiles of one document that begin together, as with a causal mask, then follow
// each other by one addition; the other way a tile would wait until those before it have come to its diagonal.
#pragma once
#include "attention_tiles.cuh"

namespace longvita::cuda {

// Floats that a warpgroup has of a block of queries' dq: columns D / 2 · half …, as its threads have them in accumulators: d[4·j … 4·j + 3]
// of thread t at 512·j + 4·t.
template <int D> constexpr int kShare = kStatsRows * D / 2;

// Sums in global memory, by slots of kStatsRows queries like the row statistics: document d's begin at slot cu[d] / kStatsRows + d.
struct Sums {
  float* data;                  // (heads, slots, 2, kShare)
  int* turns;                   // (heads, slots, 2): how many tiles have added
  int64_t slots;
};
LV_DEVICE int64_t share_at(const Sums& s, int head, int slot, int half) { return (head * s.slots + slot) * 2 + half; }

// Shared memory beside that of dk and dv. Two buffers of dS, because who is ahead writes one while the other one is still read.
template <int D> struct SinglePass {
  Panel<kTile, kStatsRows> slopes[2];
  float sums[2][kShare<D>];
};
struct SinglePassBarriers { Barrier slopes_full[2], slopes_empty[2], sums_full[2], sums_empty[2]; };
constexpr int kAddingWarps = 2;

LV_DEVICE void single_pass_init(SinglePassBarriers& b) {
  for (int i = 0; i < 2; ++i) {
    barrier_init(b.slopes_full[i], kConsumerWarps), barrier_init(b.slopes_empty[i], kConsumerWarps);
    barrier_init(b.sums_full[i], kConsumerWarps / 2), barrier_init(b.sums_empty[i], 1);
  }
}

// ------------------------------------------------------------------------------------------------- in the warpgroups that multiply
// `step` counts all steps of the block, so it says which buffer and which phase.

// A warp's 16 keys × 64 queries of dS, packed accumulators. The eight rows of a matrix are swizzled to eight places: no two meet in a bank.
template <int D>
LV_DEVICE void put_slopes(SinglePass<D>& s, SinglePassBarriers& b, int step, const uint32_t (&packed)[kStatsRows / 4], int half) {
  const int row = half * 64 + thread() / 32 % 4 * 16 + lane() % 16;
  barrier_wait(b.slopes_empty[step & 1], (step >> 1 & 1) ^ 1);
  LV_UNROLL
  for (int j = 0; j < kStatsRows / 8; j += 2) {
    store_matrices(&s.slopes[step & 1].half[0][row][((j + lane() / 16) ^ lane() % 8) * 8], &packed[2 * j]);
  }
  async_fence();
  warp_sync();
  if (lane() == 0) barrier_arrive(b.slopes_full[step & 1]);
}

// One batch, not waited for.
template <class T, int D>
LV_DEVICE void multiply_slopes(float (&dq)[D / 4], SinglePass<D>& s, SinglePassBarriers& b, int step, const Panel<kTile, D>& keys,
                               int half) {
  barrier_wait(b.slopes_full[step & 1], step >> 1 & 1);
  multiply_columns<T, D / 2>(dq, s.slopes[step & 1], keys, half * (D / 2));
}

// When that batch is done. Neighbours in a warp write 16 bytes beside each other.
template <int D> LV_DEVICE void put_sums(SinglePass<D>& s, SinglePassBarriers& b, int step, const float (&dq)[D / 4], int half) {
  if (lane() == 0) barrier_arrive(b.slopes_empty[step & 1]);
  Word4* at = reinterpret_cast<Word4*>(s.sums[half]) + thread() % 128;
  barrier_wait(b.sums_empty[half], (step & 1) ^ 1);
  LV_UNROLL
  for (int j = 0; j < D / 16; ++j) {
    const float* x = &dq[4 * j];
    shared_store(at + j * 128, Word4{bits_of_float(x[0]), bits_of_float(x[1]), bits_of_float(x[2]), bits_of_float(x[3])});
  }
  async_fence();
  warp_sync();
  if (lane() == 0) barrier_arrive(b.sums_full[half]);
}

// --------------------------------------------------------------------------------------------------------------- in a warp beside them

// The warp that adds what one warpgroup makes; it does not hold up the other one's.
template <int D>
LV_DEVICE void add_sums(SinglePass<D>& s, SinglePassBarriers& b, TileQueue& queue, const Sums& sums, const Documents& d, int group,
                        int half) {
  constexpr int kBytes = kShare<D> * int(sizeof(float));
  int step = 0;
  for (int turn = 0;; ++turn) {
    const Tile tile = shared_load(next_tile(queue, turn));
    if (tile.head < 0) return;
    for (int i = tile.count - 1; lane() == 0 && i >= 0; --i) {
      const int block = tile.begin + i, slot = tile.start_columns / kStatsRows + tile.document + block;
      // The first row that sees the block's first column is in the first tile that sees the block.
      const int64_t sees = larger(int64_t(block) * kStatsRows - (tile.columns - tile.rows) - d.right, int64_t(0));
      const int before = tile.first / kTile - int(sees / kTile);
      for (int member = 0; member < group; ++member, ++step) {
        const int64_t at = share_at(sums, tile.head * group + member, slot, half);
        float* to = sums.data + at * kShare<D>;
        wait_at_least(sums.turns + at, before);
        global_fence();
        barrier_wait(b.sums_full[half], step & 1);
        if (before == 0) store_bytes(to, s.sums[half], kBytes);         // what was there is nobody's
        else add_floats(to, s.sums[half], kBytes);
        stores_commit();
        stores_read();
        barrier_arrive(b.sums_empty[half]);
        stores_wait();
        raise(sums.turns + at);
      }
    }
    done_with_tile(queue, turn);
  }
}

// ----------------------------------------------------------------------------------------------------------------------- dq of the sums

struct SumsParameters {
  Sums sums;
  Documents documents;          // rows: queries
  Target target;
  int heads;
  float scale;
  bool add;
};

constexpr int kSumsThreads = 256;       // as many as have made the sums, each what one of them had

template <class T, int D> LV_KERNEL(kSumsThreads) sums_kernel(LV_PARAMETERS(SumsParameters) p) {
  const int slot = block() / p.heads, head = block() % p.heads, half = thread() / 128;
  const int document = document_of(p.documents, slot, kStatsRows);
  const Extent rows = extent(p.documents.cu_rows, document, p.documents.rows);
  Tile tile{};
  tile.start_rows = rows.start, tile.rows = rows.length, tile.head = head;
  tile.first = larger(slot - rows.start / kStatsRows - document, 0) * kStatsRows;
  if (tile.first >= rows.length) return;        // an empty slot
  const int64_t at = share_at(p.sums, head, slot, half);
  const bool seen = global_load(p.sums.turns + at) > 0;
  const Word4* from = reinterpret_cast<const Word4*>(p.sums.data + at * kShare<D>) + thread() % 128;
  float dq[D / 4];
  LV_UNROLL
  for (int j = 0; j < D / 16; ++j) {
    const Word4 x = seen ? global_load(from + j * 128) : Word4{0, 0, 0, 0};
    dq[4 * j] = float_of_bits(x.x), dq[4 * j + 1] = float_of_bits(x.y);
    dq[4 * j + 2] = float_of_bits(x.z), dq[4 * j + 3] = float_of_bits(x.w);
  }
  const float scale[2] = {p.scale, p.scale};
  Target to = p.target;
  to.data += half * (D / 2) * (to.wide ? sizeof(float) : sizeof(T));
  store_tile<T, D / 2>(to, dq, scale, tile, 0, p.add);
}

}  // namespace longvita::cuda
