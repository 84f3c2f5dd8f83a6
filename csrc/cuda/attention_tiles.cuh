// What the kernels of packed attention share: which tiles there are and who takes them, what a tile sees, how results are stored.
//
// Documents are cut into tiles of kTile rows. Tile slots are numbered so that document d begins at slot cu[d] / kTile + d: every tile of
// every document has a slot, and total / kTile + docs slots are enough, a number that the host knows without reading cu. schedule_kernel
// makes a list of the tiles that there are, those with most work first; blocks take (tile, head) after (tile, head) from it, in its order.
// Offsets are clamped to the tokens that there are: wrong ones give wrong numbers, never a wrong address.
#pragma once
#include <cstdint>

#include "sm90.cuh"

namespace longvita::cuda {

using namespace longvita::sm90;

constexpr int kTile = 128;              // rows of a tile, in every kernel
constexpr int kStatsRows = 64;          // rows of a slot of the backward's row statistics
constexpr int kThreads = 384;           // a warpgroup that loads, two that multiply
constexpr int kConsumerWarps = 8;
constexpr int kSharedLimit = 227 << 10;        // bytes of shared memory that a block may have

// ------------------------------------------------------------------------------------------------------------------------- documents

struct Documents {
  const int32_t* cu_rows;       // of the tiles
  const int32_t* cu_columns;    // of what they see
  int docs, rows, columns;      // tokens of either
  int left, right;              // row i sees columns i + columns − rows − left … + right of its document; kOpen: all
};
constexpr int kOpen = 1 << 30;

struct Extent { int start, length; };

LV_DEVICE int offset_at(const int32_t* cu, int index, int low, int high) { return smaller(larger(global_load(cu + index), low), high); }

LV_DEVICE Extent extent(const int32_t* cu, int document, int total) {
  const int start = offset_at(cu, document, 0, total);
  return {start, offset_at(cu, document + 1, start, total) - start};
}

LV_DEVICE int document_of(const Documents& d, int slot, int tile = kTile) {
  int low = 0, high = d.docs - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (offset_at(d.cu_rows, middle, 0, d.rows) / tile + middle <= slot) low = middle;
    else high = middle - 1;
  }
  return low;
}

// Columns low ≤ j < high that row i of a document sees (`shift`: its columns − its rows).
struct Span { int low, high; };
LV_DEVICE Span seen_by(int row, int shift, int left, int right, int columns) {
  const int64_t aligned = int64_t(row) + shift;
  const int low = int(smaller(larger(aligned - left, int64_t(0)), int64_t(columns)));
  return {low, int(larger(smaller(aligned + right + 1, int64_t(columns)), int64_t(low)))};
}

// ------------------------------------------------------------------------------------------------------------------------------ tiles

struct alignas(16) Tile {
  int start_rows, rows;         // its document: first token, tokens
  int start_columns, columns;
  int document, first;          // first row of the tile, counted in the document
  int head;                     // −1: there are no more tiles
  int begin, count;             // blocks of columns that it sees: the first, how many
};

LV_DEVICE Tile tile_of(const Documents& d, int document, int first, int head, int block) {
  const Extent rows = extent(d.cu_rows, document, d.rows), columns = extent(d.cu_columns, document, d.columns);
  const int last = smaller(first + kTile, rows.length) - 1, shift = columns.length - rows.length;
  const int low = seen_by(first, shift, d.left, d.right, columns.length).low;
  const int high = seen_by(last, shift, d.left, d.right, columns.length).high;
  const int begin = low / block, end = high > low ? (high + block - 1) / block : begin;
  return {rows.start, rows.length, columns.start, columns.length, document, first, head, begin, end - begin};
}

// The list of tiles in global memory.
struct Entry { int document, first; };
struct Schedule {
  Entry* entries;               // one a slot at most
  int* cost;                    // of every slot; then its place in the list
  int* counters;                // tiles in the list; (tile, head) pairs taken so far
  int slots;
};

constexpr int kBuckets = 512;   // 16 a power of two: sorting to 6 % is enough
LV_DEVICE int bucket_of(int cost) {
  return kBuckets - 1 - smaller(int(bits_of_float(float(cost)) >> 19) - (127 << 4), kBuckets - 1);
}

// `ascending`: tiles of a document come in the order of their rows, for kernels whose tiles wait for those before them.
struct ScheduleParameters { Documents d; Schedule s; bool ascending; };
struct ScheduleShared { int start[kBuckets], sum[2][kBuckets], wrong; };

// What tiles are sorted by: the columns that it sees. `ascending` takes instead what never rises along a document, because the first
// column that rows see never falls; with a causal mask, or where nothing is clipped, it is the same number.
LV_DEVICE int cost_of(const Documents& d, Extent rows, Extent columns, int first, bool ascending) {
  const int shift = columns.length - rows.length, last = smaller(first + kTile, rows.length) - 1;
  const int low = seen_by(first, shift, d.left, d.right, columns.length).low;
  if (ascending) return int(smaller(int64_t(columns.length) - low, int64_t(d.left) + d.right + kTile)) + 1;
  return larger(seen_by(last, shift, d.left, d.right, columns.length).high - low, 0) + 1;
}

// One block of kBuckets threads: a counting sort of the tiles by their cost, ties in the order of their slots.
static LV_KERNEL(kBuckets) schedule_kernel(LV_PARAMETERS(ScheduleParameters) p) {
  ScheduleShared& s = shared<ScheduleShared>();
  const int t = thread();
  shared_store(&s.start[t], 0);
  if (t == 0) shared_store(&s.wrong, 0);
  block_sync();
  if (p.ascending) {            // a tile that waits for one which no list has would wait for ever: where offsets fall, there are no tiles
    for (int i = t; i < p.d.docs; i += kBuckets) {
      const bool rise = global_load(p.d.cu_rows + i) <= global_load(p.d.cu_rows + i + 1) &&
                        global_load(p.d.cu_columns + i) <= global_load(p.d.cu_columns + i + 1);
      if (!rise) shared_store(&s.wrong, 1);
    }
  }
  for (int slot = t; slot < p.s.slots; slot += kBuckets) {
    const int document = document_of(p.d, slot);
    const Extent rows = extent(p.d.cu_rows, document, p.d.rows), columns = extent(p.d.cu_columns, document, p.d.columns);
    const int first = larger(slot - rows.start / kTile - document, 0) * kTile;
    int cost = 0;               // an empty slot
    if (first < rows.length) {
      cost = cost_of(p.d, rows, columns, first, p.ascending);
      shared_add(&s.start[bucket_of(cost)], 1);
    }
    global_store(p.s.cost + slot, cost);
  }
  block_sync();
  int from = 0;                 // sums over the buckets before each, in log₂ steps
  shared_store(&s.sum[from][t], shared_load(&s.start[t]));
  block_sync();
  for (int step = 1; step < kBuckets; step *= 2) {
    int sum = shared_load(&s.sum[from][t]);
    if (t >= step) sum += shared_load(&s.sum[from][t - step]);
    from ^= 1;
    shared_store(&s.sum[from][t], sum);
    block_sync();
  }
  if (t == 0) {
    global_store(p.s.counters, shared_load(&s.wrong) ? 0 : shared_load(&s.sum[from][kBuckets - 1]));
    global_store(p.s.counters + 1, 0);
  }
  shared_store(&s.start[t], t == 0 ? 0 : shared_load(&s.sum[from][t - 1]));
  block_sync();
  for (int begin = 0; t < 32 && begin < p.s.slots; begin += 32) {       // one warp numbers them, so that ties keep their order
    const int slot = begin + t, cost = slot < p.s.slots ? global_load(p.s.cost + slot) : 0;
    const int bucket = cost ? bucket_of(cost) : kBuckets;
    const uint32_t same = warp_match(bucket);
    const int place = cost ? shared_load(&s.start[bucket]) + ones(same & ((1u << t) - 1)) : -1;
    warp_sync();
    if (cost && same >> t == 1) shared_store(&s.start[bucket], place + 1);      // the last of the same
    warp_sync();
    if (slot < p.s.slots) global_store(p.s.cost + slot, place);
  }
  block_sync();
  for (int slot = t; slot < p.s.slots; slot += kBuckets) {
    const int place = global_load(p.s.cost + slot);
    if (place < 0) continue;
    const int document = document_of(p.d, slot), start = extent(p.d.cu_rows, document, p.d.rows).start;
    global_store(p.s.entries + place, Entry{document, larger(slot - start / kTile - document, 0) * kTile});
  }
}

// The loading warp takes the next (tile, head) and hands it to the others through one of two places in shared memory.
struct TileQueue {
  Tile tile[2];
  Barrier full[2], empty[2];
};

LV_DEVICE void queue_init(TileQueue& q, int readers = kConsumerWarps) {
  for (int i = 0; i < 2; ++i) barrier_init(q.full[i], 1), barrier_init(q.empty[i], readers);
}

LV_DEVICE Tile take_tile(TileQueue& q, int turn, const Documents& d, const Schedule& s, int heads, int block) {
  const int item = shuffle(lane() == 0 ? global_add(s.counters + 1, 1) : 0, 0);
  Tile tile{};
  tile.head = -1;
  if (item / heads < global_load(s.counters)) {
    const Entry entry = global_load(s.entries + item / heads);
    tile = tile_of(d, entry.document, entry.first, item % heads, block);
  }
  barrier_wait(q.empty[turn & 1], (turn >> 1 & 1) ^ 1);
  if (lane() == 0) shared_store(&q.tile[turn & 1], tile), barrier_arrive(q.full[turn & 1]);
  return tile;
}

// The others read a tile where it lies, as often as they need it: what is not kept costs no register in their loops.
LV_DEVICE const Tile* next_tile(TileQueue& q, int turn) {
  barrier_wait(q.full[turn & 1], turn >> 1 & 1);
  return &q.tile[turn & 1];
}
LV_DEVICE void done_with_tile(TileQueue& q, int turn) {
  warp_sync();
  if (lane() == 0) barrier_arrive(q.empty[turn & 1]);
}

// --------------------------------------------------------------------------------------------------------- rows of a thread, and masks

// A warpgroup has rows 64 · half … of a tile, a thread the one of this number in the document and the one eight further.
LV_DEVICE int row_of_thread(const Tile& t, int half) { return t.first + half * 64 + thread() / 32 % 4 * 16 + lane() / 4; }

LV_DEVICE Span seen_by(const Tile& t, const Documents& d, int row) { return seen_by(row, t.columns - t.rows, d.left, d.right, t.columns); }

// Columns that all 64 rows of a warpgroup see: blocks inside need no mask. ENDS: rows beyond the document's end see none.
template <bool ENDS = false> LV_DEVICE Span seen_by_all(const Tile& t, const Documents& d, int half) {
  const int top = t.first + half * 64;
  if (ENDS && top + 63 >= t.rows) return {0, 0};
  return {seen_by(t, d, top + 63).low, seen_by(t, d, top).high};
}

// Scores of columns from … from + N − 1 that a row does not see become −∞.
template <int N, bool ENDS = false>
LV_DEVICE void mask_scores(float (&scores)[N / 2], int from, const Tile& t, const Documents& d, int half) {
  const int row = row_of_thread(t, half), column = from + lane() % 4 * 2;
  LV_UNROLL
  for (int h = 0; h < 2; ++h) {
    const Span span = ENDS && row + 8 * h >= t.rows ? Span{0, 0} : seen_by(t, d, row + 8 * h);
    const int low = span.low - column, high = span.high - column;
    LV_UNROLL
    for (int j = 0; j < N / 8; ++j) {
      LV_UNROLL
      for (int e = 0; e < 2; ++e) {
        if (8 * j + e < low || 8 * j + e >= high) scores[4 * j + 2 * h + e] = -infinity();
      }
    }
  }
}

// Accumulators rounded and packed: the A registers of the next product.
template <class T, int N> LV_DEVICE void pack_all(const float (&x)[N], uint32_t (&packed)[N / 2]) {
  LV_UNROLL
  for (int i = 0; i < N / 2; ++i) packed[i] = pack<T>(x[2 * i], x[2 * i + 1]);
}

// -------------------------------------------------------------------------------------------------------------------- tiles in memory

// A place in a ring of STAGES buffers and the parity of its barriers.
template <int STAGES> struct Ring {
  int stage = 0;
  uint32_t parity = 0;
  LV_DEVICE void advance() {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
};

// ROWS × D elements of 16 bits as the tensor copy leaves them: halves of 64 columns, each swizzled.
template <int ROWS, int D> struct alignas(1024) Panel {
  uint16_t half[D / kSwizzleRow][ROWS][kSwizzleRow];
  static constexpr int kBytes = ROWS * D * 2, kHalf = ROWS * kSwizzleRow * 2;
};

// Asks for rows token … token + ROWS − 1 of a head; one thread does, which has told `full` to expect kBytes.
constexpr int kBoxRows = 64;            // of the tensor maps; divides ROWS
template <int ROWS, int D> LV_DEVICE void load_panel(Panel<ROWS, D>& to, const TensorMap& map, Barrier& full, int head, int token) {
  for (int h = 0; h < D / kSwizzleRow; ++h) {
    for (int r = 0; r < ROWS; r += kBoxRows) load_box(&to.half[h][r], map, full, h * kSwizzleRow, head, token + r);
  }
}

// The same where nothing else comes with it.
template <int ROWS, int D> LV_DEVICE void load_alone(Panel<ROWS, D>& to, const TensorMap& map, Barrier& full, int head, int token) {
  barrier_expect(full, Panel<ROWS, D>::kBytes);
  load_panel(to, map, full, head, token);
}

// Zeros in the rows from `rows` on, by a whole warp: they are of the next document, and 0 · NaN would be NaN. async_fence comes after.
template <int ROWS, int D> LV_DEVICE void clear_rows(Panel<ROWS, D>& panel, int rows) {
  for (int h = 0; h < D / kSwizzleRow; ++h) {
    Word4* at = reinterpret_cast<Word4*>(&panel.half[h][rows][0]);
    for (int i = lane(); i < (ROWS - rows) * 8; i += 32) shared_store(at + i, Word4{0, 0, 0, 0});
  }
}

// ------------------------------------------------------------------------------------------------------------------------- products

// D (64, N) of a warpgroup = A (64 rows of a panel from `row` on) · B (N rows of a panel)ᵀ, over all columns. One batch, not waited for.
template <class T, int N, int ROWS_A, int ROWS_B, int D>
LV_DEVICE void multiply_rows(float (&d)[N / 2], const Panel<ROWS_A, D>& a, int row, const Panel<ROWS_B, D>& b) {
  static_assert(N == ROWS_B);
  const uint32_t a_at = shared_address(&a.half[0][row][0]), b_at = shared_address(&b);
  multiply_fence();
  LV_UNROLL
  for (int k = 0; k < D / 16; ++k) {
    const uint32_t column = k % 4 * 32;
    multiply<T, N, false>(d, along_rows(a_at + k / 4 * Panel<ROWS_A, D>::kHalf + column),
                          along_rows(b_at + k / 4 * Panel<ROWS_B, D>::kHalf + column), k > 0);
  }
  multiply_commit();
}

// D (64, N) += A (64, ROWS) in registers · B (ROWS, N = D), a panel. One batch, not waited for.
template <class T, int ROWS, int D>
LV_DEVICE void multiply_add(float (&d)[D / 2], const uint32_t (&a)[ROWS / 4], const Panel<ROWS, D>& b) {
  const uint32_t b_at = shared_address(&b);
  multiply_fence();
  LV_UNROLL
  for (int k = 0; k < ROWS / 16; ++k) {
    multiply<T, D, true>(d, &a[4 * k], across_rows(b_at + k * 16 * kSwizzleRow * 2, Panel<ROWS, D>::kHalf), true);
  }
  multiply_commit();
}

// D (64, N) = Aᵀ · B, summed over the ROWS that both have: all 64 columns of A, N columns of B from `column` on. One batch, not waited for.
template <class T, int N, int ROWS, int D>
LV_DEVICE void multiply_columns(float (&d)[N / 2], const Panel<ROWS, 64>& a, const Panel<ROWS, D>& b, int column) {
  const uint32_t a_at = shared_address(&a);
  const uint32_t b_at = shared_address(&b) + column / kSwizzleRow * Panel<ROWS, D>::kHalf + column % kSwizzleRow * 2;
  multiply_fence();
  LV_UNROLL
  for (int k = 0; k < ROWS / 16; ++k) {
    const uint32_t row = k * 16 * kSwizzleRow * 2;
    multiply<T, N, true, true>(d, across_rows(a_at + row, Panel<ROWS, 64>::kHalf), across_rows(b_at + row, Panel<ROWS, D>::kHalf), k > 0);
  }
  multiply_commit();
}

// --------------------------------------------------------------------------------------------------------------------------- results

struct Target {                 // (tokens, heads, D); strides in elements
  char* data;
  int64_t stride_token, stride_head;
  bool wide;                    // float32, else T
};

// Lanes c = 0 … 3 of four exchange words so that lane c has word c of each: `words[i]` becomes what lane i had in `words[c]`.
LV_DEVICE void transpose_quad(uint32_t (&words)[4]) {
  const bool odd = lane() & 1, upper = lane() & 2;
  LV_UNROLL
  for (int i = 0; i < 4; i += 2) {
    const uint32_t got = shuffle_xor(odd ? words[i] : words[i + 1], 1);
    words[i] = odd ? got : words[i], words[i + 1] = odd ? words[i + 1] : got;
  }
  LV_UNROLL
  for (int i = 0; i < 2; ++i) {
    const uint32_t got = shuffle_xor(upper ? words[i] : words[i + 2], 2);
    words[i] = upper ? got : words[i], words[i + 2] = upper ? words[i + 2] : got;
  }
}

struct alignas(8) Float2 { float x, y; };

// Writes a warpgroup's accumulator, times `factor` by row; rows beyond the document are not written. `add`: on top of what stands there.
template <class T, int D>
LV_DEVICE void store_tile(const Target& to, const float (&d)[D / 2], const float (&factor)[2], const Tile& tile, int half, bool add) {
  if (!to.data) return;
  const int row = row_of_thread(tile, half), rows = tile.rows, token = tile.start_rows, head = tile.head;
  const int column = lane() % 4 * 2;
  LV_UNROLL
  for (int h = 0; h < 2; ++h) {
    const bool inside = row + 8 * h < rows;
    const int64_t at = (int64_t(token) + row + 8 * h) * to.stride_token + head * to.stride_head;
    LV_UNROLL
    for (int j = 0; j < D / 8; j += 4) {
      uint32_t words[4];
      LV_UNROLL
      for (int i = 0; i < 4; ++i) {
        float x = d[4 * (j + i) + 2 * h] * factor[h], y = d[4 * (j + i) + 2 * h + 1] * factor[h];
        const int64_t element = at + 8 * (j + i) + column;
        if (to.wide) {
          Float2* place = reinterpret_cast<Float2*>(to.data) + element / 2;
          if (!inside) continue;
          const Float2 before = add ? global_load(place) : Float2{0, 0};
          global_store(place, Float2{x + before.x, y + before.y});
          continue;
        }
        if (add && inside) {
          const uint32_t before = global_load(reinterpret_cast<const uint32_t*>(to.data) + element / 2);
          x += widen<T>(before & 0xffff), y += widen<T>(before >> 16);
        }
        words[i] = pack<T>(x, y);
      }
      if (to.wide) continue;
      transpose_quad(words);    // a lane had 4 bytes of four pieces of 16; now it has one piece whole
      Word4* place = reinterpret_cast<Word4*>(to.data) + at / 8 + j + lane() % 4;
      if (inside) global_store(place, Word4{words[0], words[1], words[2], words[3]});
    }
  }
}

}  // namespace longvita::cuda
