#include "gemm/gemm.h"

#include <cstring>

namespace longvita::LV_ISA {
namespace {

LV_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
LV_INLINE int64_t at_most(int64_t a, int64_t limit) { return a < limit ? a : limit; }

// ---------------------------------------------------------------------------------------------- what a word is
struct Single {                       // one fp32 value
  using Value = float;
  static constexpr int64_t kDepth = 1;
  LV_INLINE const float* read(const RowSource& source, int64_t row, int64_t col, int64_t count, float* buffer) {
    return source.read(row, col, count, buffer);
  }
  LV_INLINE vf multiply_add(vf sum, float a, vf b) { return b * a + sum; }
};

struct Pairs {                        // two bf16 values, k and k + 1
  using Value = bf16_t;
  static constexpr int64_t kDepth = 2;
  LV_INLINE const bf16_t* read(const RowSource& source, int64_t row, int64_t col, int64_t count, float* buffer) {
    return source.read_bf16(row, col, count, reinterpret_cast<bf16_t*>(buffer));
  }
  LV_INLINE vf multiply_add(vf sum, float a, vf b) {
    uint32_t bits;
    std::memcpy(&bits, &a, 4);
    return dot_pairs(sum, vu{} + bits, (vu)b);
  }
};

// Elements between rows of an A that needs no copy, or 0: whole words of a matrix whose rows spread over the cache.
int64_t in_place(const Product& p) {
  const bool pairs = kBf16Pairs && p.pairs;
  return p.a.k_dense && (!pairs || p.K % 2 == 0) ? p.a.source.in_place(pairs ? DType::bf16 : DType::f32) : 0;
}

// Rows of A that are packed at a time: what fits into L2, evenly cut.
LV_INLINE int64_t block_rows(int64_t rows) {
  const int64_t blocks = ceil_div(rows, kTileM);
  return blocks > 1 ? ceil_div(ceil_div(rows, blocks), kMr) * kMr : kTileM;
}

// ---------------------------------------------------------------------------------------------- packing
// A block of one operand: `count` rows or columns of C from `first`, values k0 … k0+depth of k, which make `words` words.
struct Block {
  int64_t first, count, k0, depth, words;
};

LV_INLINE void prefetch(const void* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(from) + i);
}

// Rows run along k: keeps them as rows, kLda apart, zero rows up to a whole register tile.
template <class Path>
void pack_rows(const RowSource& source, const Block& block, float* out) {
  constexpr int64_t kAhead = 6;
  const int64_t bytes = block.depth * int64_t(sizeof(typename Path::Value));
  for (int64_t i = 0; i < block.count; ++i, out += kLda) {
    if (i + kAhead < block.count) prefetch(source.where(block.first + i + kAhead, block.k0), bytes);
    const auto* row = Path::read(source, block.first + i, block.k0, block.depth, out);
    if ((const void*)row != (const void*)out) std::memcpy(out, row, size_t(bytes));
    std::memset(reinterpret_cast<char*>(out) + bytes, 0, size_t(block.words * 4 - bytes));
  }
  for (int64_t i = block.count; i % kMr != 0; ++i, out += kLda) std::memset(out, 0, size_t(block.words) * 4);
}

// Rows run along k: into panels of kNr columns, W × W words at a time.
template <class Path>
void pack_transposed(const RowSource& source, const Block& block, float* out, float* buffers) {
  using Value = typename Path::Value;
  for (int64_t j = 0; j < block.count; j += W) {
    const int64_t rows = at_most(block.count - j, W), next = at_most(block.count - j - rows, W);
    const Value* row[W];
    const char* ahead[W];
    for (int64_t i = 0; i < rows; ++i) {
      row[i] = Path::read(source, block.first + j + i, block.k0, block.depth, buffers + i * kRowFloats);
    }
    for (int64_t i = 0; i < next; ++i) ahead[i] = static_cast<const char*>(source.where(block.first + j + W + i, block.k0));
    float* panel = out + j / kNr * kPanelB + j % kNr;
    for (int64_t k = 0; k < block.words; k += W) {
      for (int64_t i = 0; i < next; ++i) __builtin_prefetch(ahead[i] + k * 4);
      const int64_t left = at_most(block.depth - k * Path::kDepth, W * Path::kDepth);
      vf x[W];
      if (left == W * Path::kDepth && rows == W) {
#pragma GCC unroll 16
        for (int64_t i = 0; i < W; ++i) std::memcpy(&x[i], row[i] + k * Path::kDepth, sizeof(vf));
      } else {
        for (int64_t i = 0; i < W; ++i) {
          x[i] = vf{};
          if (i < rows) std::memcpy(&x[i], row[i] + k * Path::kDepth, size_t(left) * sizeof(Value));
        }
      }
      transpose(x);
#pragma GCC unroll 16
      for (int64_t i = 0; i < W; ++i) store(panel + (k + i) * kNr, x[i]);      // words past the end: kKc is a multiple of W
    }
  }
}

// W words of one k into panels of kWidth, from column i on (a multiple of W).
template <int64_t kWidth, int64_t kPanel>
LV_INLINE void store_columns(float* out, int64_t i, vf words) {
  constexpr int64_t kPiece = kWidth < W ? kWidth : W;
#pragma GCC unroll 4
  for (int64_t c = 0; c < W; c += kPiece) {
    std::memcpy(out + (i + c) / kWidth * kPanel + (i + c) % kWidth, reinterpret_cast<float*>(&words) + c, kPiece * 4);
  }
}

// Rows run across k: cut into panels of kWidth, zeros up to a whole vector.
template <class Path, int64_t kWidth, int64_t kPanel>
void pack_panels(const RowSource& source, const Block& block, float* out, float* buffers) {
  constexpr int64_t kAhead = 6, kDepth = Path::kDepth;
  const int64_t bytes = block.count * int64_t(sizeof(typename Path::Value));
  for (int64_t k = 0; k < block.words; ++k, out += kWidth) {
    const int64_t from = block.k0 + k * kDepth, left = block.depth - k * kDepth;
    for (int64_t i = 0; i < kDepth; ++i) {
      if (kAhead * kDepth + i < left) prefetch(source.where(from + kAhead * kDepth + i, block.first), bytes);
    }
    const auto* row = Path::read(source, from, block.first, block.count, buffers);
    if constexpr (kDepth == 1) {
      for (int64_t i = 0; i < block.count; i += W) {
        store_columns<kWidth, kPanel>(out, i, load_n(row + i, int(at_most(block.count - i, W))));
      }
    } else {
      const bf16_t* odd = left > 1 ? Path::read(source, from + 1, block.first, block.count, buffers + kRowFloats) : nullptr;
      for (int64_t i = 0; i < block.count; i += 2 * W) {
        const int lanes = int(at_most(block.count - i, 2 * W));
        const Zipped words = zip_bf16(row + i, odd == nullptr ? nullptr : odd + i, lanes);
        store_columns<kWidth, kPanel>(out, i, words.low);
        if (lanes > W) store_columns<kWidth, kPanel>(out, i + W, words.high);
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------- reading ahead
// A core that packs waits for memory most of the time, one that multiplies never does. So the rows that will be packed next are asked for
// while the present block is multiplied: a few lines at each of kMr stages of each register tile, because few can be under way at a time.
// A register tile asks for one piece of a row, or, where there are more rows than register tiles, for 2, 4 … kMr rows.
struct Ahead {
  const RowSource* source;
  int64_t row, end, col;              // rows still to ask for
  int64_t pieces = 1, piece = 0;      // of a row; the next of them
  int64_t lines, at_stage;            // of a piece; of these at each stage
  int shift = 0;                      // 1 << shift pieces a register tile
  const char* from[kMr] = {};

  Ahead(const Operand& operand, const Block& block, int64_t value_bytes, int64_t register_tiles) : source(&operand.source) {
    row = operand.k_dense ? block.first : block.k0, end = row + (operand.k_dense ? block.count : block.depth);
    col = operand.k_dense ? block.k0 : block.first;
    const int64_t rows = end - row, row_lines = ceil_div(value_bytes * (operand.k_dense ? block.depth : block.count), kLineBytes);
    while (rows > register_tiles << shift && 1 << shift < kMr) ++shift;
    if (rows > 0 && shift == 0) pieces = register_tiles / rows;
    lines = ceil_div(row_lines, pieces), at_stage = ceil_div(lines << shift, kMr);
  }
  void next() {
    for (int64_t i = 0; i < 1 << shift; ++i) {
      from[i] = row < end ? static_cast<const char*>(source->where(row, col)) : nullptr;
      if (from[i] != nullptr) from[i] += piece * lines * kLineBytes;
      if (++piece == pieces) piece = 0, ++row;
    }
  }
};
LV_INLINE void ask(const Ahead& ahead, int64_t stage) {
  const int64_t per_piece = kMr >> ahead.shift, done = (stage & (per_piece - 1)) * ahead.at_stage;
  const char* from = ahead.from[stage * (1 << ahead.shift) / kMr];
  if (from == nullptr) return;
  for (int64_t i = done; i < at_most(done + ahead.at_stage, ahead.lines); ++i) __builtin_prefetch(from + i * kLineBytes, 0, 2);
}

// ---------------------------------------------------------------------------------------------- register tile
// Rows of sums, `stride` apart: kMr of them, kVectors wide.
struct Sums {
  float* at;
  int64_t stride;
};

// to = from (or nothing) + a · b over `words` words. a: rows lda apart (kRows) or a panel of kMr; b: a panel of kNr, of which kVectors count.
template <class Path, bool kRows, int kVectors>
void register_tile(int64_t words, const float* a, int64_t lda, const float* b, Sums from, Sums to, const Ahead& ahead_a, const Ahead& ahead_b) {
  const Sums touch = from.at != nullptr ? from : to;
  vf sum[kMr][kVectors];
#pragma GCC unroll 8
  for (int64_t i = 0; i < kMr; ++i) {
#pragma GCC unroll 3
    for (int64_t j = 0; j < kVectors; ++j) sum[i][j] = vf{};
  }
  for (int64_t stage = 0, k = 0; stage < kMr; ++stage) {
    prefetch(touch.at + stage * touch.stride, kVectors * W * 4);
    ask(ahead_a, stage);
    ask(ahead_b, stage);
    for (const int64_t end = words * (stage + 1) / kMr; k < end; ++k) {
      vf bv[kVectors];
#pragma GCC unroll 3
      for (int64_t j = 0; j < kVectors; ++j) bv[j] = load(b + j * W);
#pragma GCC unroll 8
      for (int64_t i = 0; i < kMr; ++i) {
        const float av = kRows ? a[i * lda] : a[i];
#pragma GCC unroll 3
        for (int64_t j = 0; j < kVectors; ++j) sum[i][j] = Path::multiply_add(sum[i][j], av, bv[j]);
      }
      a += kRows ? 1 : kMr;
      b += kNr;
    }
  }
  if (from.at != nullptr) {
#pragma GCC unroll 8
    for (int64_t i = 0; i < kMr; ++i) {
#pragma GCC unroll 3
      for (int64_t j = 0; j < kVectors; ++j) sum[i][j] += load(from.at + i * from.stride + j * W);
    }
  }
#pragma GCC unroll 8
  for (int64_t i = 0; i < kMr; ++i) {
#pragma GCC unroll 3
    for (int64_t j = 0; j < kVectors; ++j) store(to.at + i * to.stride + j * W, sum[i][j]);
  }
}

// The part of a finished register tile that exists, to its destination.
template <class T>
void deliver(const Destination& out, const float* sums, int64_t m, int64_t n, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; ++i) {
    T* to = static_cast<T*>(out.data) + (m + i) * out.stride + n;
    for (int64_t j = 0; j < columns; j += W) {
      const int lanes = int(at_most(columns - j, W));
      vf value = load(sums + i * kNr + j) * out.factor;
      if (out.add) value += load_n(to + j, lanes);
      store_n(to + j, value, lanes);
    }
  }
}

// The lines that will be delivered, while there is a register tile's time to fetch them.
LV_INLINE void ask_to_write(const Destination& out, int64_t m, int64_t n, int64_t rows, int64_t columns) {
  const int64_t size = int64_t(dtype_size(out.dtype));
  for (int64_t i = 0; i < rows; ++i) {
    const char* to = static_cast<const char*>(out.data) + ((m + i) * out.stride + n) * size;
    for (int64_t at = 0; at < columns * size; at += kLineBytes) __builtin_prefetch(to + at, 1);
  }
}

// One block of k for a whole tile: from the sums of the blocks before (none: first) to `sums`, or (last) to the destination.
template <class Path, bool kRows>
void multiply_blocks(const Tile& tile, int64_t words, const float* a, int64_t lda, const float* b, float* sums, bool first,
                     const Destination* last, Ahead ahead_a, Ahead ahead_b) {
  alignas(64) float finished[kMr * kNr];
  constexpr auto* one = &register_tile<Path, kRows, 1>;
  constexpr auto* two = &register_tile<Path, kRows, 2>;
  constexpr auto* three = &register_tile<Path, kRows, 3>;
  for (int64_t j = 0; j < tile.nt; j += kNr) {        // the block of A stays in L2 and is read once for each panel of B
    const int64_t columns = at_most(tile.nt - j, kNr), vectors = ceil_div(columns, W);
    auto* multiply = vectors == 3 ? three : vectors == 2 ? two : one;
    for (int64_t i = 0; i < tile.mt; i += kMr) {
      const float* rows = kRows ? a + i * lda : a + i / kMr * kPanelA;
      const Sums kept = {sums + i * kTileN + j, kTileN}, from = {first ? nullptr : kept.at, kTileN};
      ahead_a.next();
      ahead_b.next();
      if (last != nullptr) ask_to_write(*last, tile.m0 + i, tile.n0 + j, at_most(tile.mt - i, kMr), columns);
      multiply(words, rows, lda, b + j / kNr * kPanelB, from, last == nullptr ? kept : Sums{finished, kNr}, ahead_a, ahead_b);
      if (last == nullptr) continue;
      auto* put = last->dtype == DType::bf16 ? &deliver<bf16_t> : last->dtype == DType::f16 ? &deliver<f16_t> : &deliver<float>;
      put(*last, finished, tile.m0 + i, tile.n0 + j, at_most(tile.mt - i, kMr), columns);
    }
  }
}

template <class Path>
float* typed_product(const Product& p, const Tile& tile, const Tile& next, float* scratch) {
  constexpr int64_t kDepth = kKc * Path::kDepth, kValueBytes = sizeof(typename Path::Value);
  float* packed_a = scratch;
  float* packed_b = packed_a + kWordsA;
  float* sums = packed_b + kWordsB;
  float* buffers = sums + kTileFloats;
  const int64_t rows = block_rows(tile.mt);
  const auto block = [&](int64_t first, int64_t count, int64_t k0) {
    const int64_t depth = at_most(p.K - k0, kDepth);
    return Block{first, count, k0, depth, ceil_div(depth, Path::kDepth)};
  };
  const int64_t stride = tile.mt % kMr == 0 ? in_place(p) : 0;
  const int64_t lda = stride > 0 ? stride / Path::kDepth : kLda;
  const int64_t K = p.K > 0 ? p.K : 1;      // a product over nothing is one over a block of zeros
  for (int64_t k0 = 0; k0 < K; k0 += kDepth) {
    const bool last = k0 + kDepth >= p.K;
    const Block block_b = block(tile.n0, tile.nt, k0);
    const Block next_b = last ? block(next.n0, next.nt, 0) : block(tile.n0, tile.nt, k0 + kDepth);
    if (p.b.k_dense) pack_transposed<Path>(p.b.source, block_b, packed_b, buffers);
    else pack_panels<Path, kNr, kPanelB>(p.b.source, block_b, packed_b, buffers);
    for (int64_t m = 0; m < tile.mt; m += rows) {
      const Tile part = {tile.m0 + m, at_most(tile.mt - m, rows), tile.n0, tile.nt};
      const bool last_rows = m + rows >= tile.mt;
      const Block block_a = block(part.m0, part.mt, k0);
      const Block next_a = !last_rows ? block(part.m0 + rows, at_most(tile.mt - m - rows, rows), k0)
                           : !last ? block(tile.m0, at_most(tile.mt, rows), k0 + kDepth) : block(next.m0, at_most(next.mt, rows), 0);
      const float* a = packed_a;
      if (stride > 0) a = static_cast<const float*>(p.a.source.where(part.m0, k0));
      else if (p.a.k_dense) pack_rows<Path>(p.a.source, block_a, packed_a);
      else pack_panels<Path, kMr, kPanelA>(p.a.source, block_a, packed_a, buffers);
      const int64_t register_tiles = ceil_div(part.mt, kMr) * ceil_div(part.nt, kNr);
      const Ahead ahead_a(p.a, next_a, kValueBytes, register_tiles), ahead_b(p.b, last_rows ? next_b : Block{}, kValueBytes, register_tiles);
      const Destination* out = last && p.out.data != nullptr ? &p.out : nullptr;
      auto* multiply = p.a.k_dense ? &multiply_blocks<Path, true> : &multiply_blocks<Path, false>;
      multiply(part, block_a.words, a, lda, packed_b, sums + m * kTileN, k0 == 0, out, ahead_a, ahead_b);
    }
  }
  return sums;
}

// ---------------------------------------------------------------------------------------------- few rows
template <class T, int kRows>
void thin(const float* a, int64_t lda, const T* b, int64_t ldb, int64_t count, int64_t K, float* out, int64_t ldo) {
  constexpr int kAtOnce = 4;          // rows of b in flight, so that the sums do not wait for each other
  const int64_t apart = ceil_div(count, kAtOnce);      // far apart: four long streams, which memory serves faster than one
  for (int64_t n = 0; n < apart; ++n) {
    const T* rows[kAtOnce];
    for (int j = 0; j < kAtOnce; ++j) rows[j] = b + at_most(n + j * apart, count - 1) * ldb;
    vf sum[kRows][kAtOnce] = {};
    const auto step = [&](int64_t k, const vf (&bv)[kAtOnce]) {
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) {
        const vf av = load(a + i * lda + k);
#pragma GCC unroll 4
        for (int j = 0; j < kAtOnce; ++j) sum[i][j] = av * bv[j] + sum[i][j];
      }
    };
    vf bv[kAtOnce];
    int64_t k = 0;
    for (; k + W <= K; k += W) {
#pragma GCC unroll 4
      for (int j = 0; j < kAtOnce; ++j) bv[j] = load(rows[j] + k);
      step(k, bv);
    }
    if (k < K) {
      for (int j = 0; j < kAtOnce; ++j) bv[j] = load_n(rows[j] + k, int(K - k));
      step(k, bv);
    }
    for (int i = 0; i < kRows; ++i) {
      for (int j = 0; j < kAtOnce && n + j * apart < count; ++j) out[i * ldo + n + j * apart] = hsum(sum[i][j]);
    }
  }
}

template <class T>
void thin_typed(const float* a, int64_t lda, int64_t rows, const T* b, int64_t ldb, int64_t count, int64_t K, float* out, int64_t ldo) {
  switch (rows) {
    case 1: return thin<T, 1>(a, lda, b, ldb, count, K, out, ldo);
    case 2: return thin<T, 2>(a, lda, b, ldb, count, K, out, ldo);
    case 3: return thin<T, 3>(a, lda, b, ldb, count, K, out, ldo);
    case 4: return thin<T, 4>(a, lda, b, ldb, count, K, out, ldo);
  }
}

template <class T>
const float* widen_typed(const T* values, int64_t count, float* buffer) {
  int64_t i = 0;
  for (; i + W <= count; i += W) store(buffer + i, load(values + i));
  if (i < count) store_n(buffer + i, load_n(values + i, int(count - i)), int(count - i));
  return buffer;
}

template <class T>
void narrow_typed(const float* values, int64_t count, T* out) {
  int64_t i = 0;
  for (; i + W <= count; i += W) store(out + i, load(values + i));
  if (i < count) store_n(out + i, load_n(values + i, int(count - i)), int(count - i));
}

}  // namespace

const float* widen_row(const void* data, DType dtype, int64_t offset, int64_t count, float* buffer) {
  if (dtype == DType::bf16) return widen_typed(static_cast<const bf16_t*>(data) + offset, count, buffer);
  if (dtype == DType::f16) return widen_typed(static_cast<const f16_t*>(data) + offset, count, buffer);
  return static_cast<const float*>(data) + offset;
}

void narrow_row(const float* values, int64_t count, void* data, DType dtype, int64_t offset) {
  if (dtype == DType::bf16) narrow_typed(values, count, static_cast<bf16_t*>(data) + offset);
  else if (dtype == DType::f16) narrow_typed(values, count, static_cast<f16_t*>(data) + offset);
  else std::memcpy(static_cast<float*>(data) + offset, values, size_t(count) * 4);
}

const bf16_t* Matrix::read_bf16(int64_t row, int64_t col, int64_t count, bf16_t* buffer) const {
  if (dtype == DType::bf16) return static_cast<const bf16_t*>(data) + offset(row, col);
  float wide[kRowFloats];
  narrow_typed(read(row, col, count, wide), count, buffer);
  return buffer;
}

// The cut that takes least, if tiles are dealt in rounds: a word that is packed costs as much as kPacking multiply-adds.
TileGrid::TileGrid(int64_t M, int64_t N, int threads, int64_t width) : M(M), N(N), tile_m(kMr), tile_n(width > 0 ? width : W) {
  constexpr int64_t kPacking = 8, kTried = 8;
  const int64_t least_rows = ceil_div(M, kTallM), least_cols = ceil_div(N, width > 0 ? width : kTileN);
  int64_t best = INT64_MAX;
  constexpr int64_t kTiny = 1024;      // elements: finding the best cut would take longer than the product
  if (width == 0 && M * N > 0 && M * N <= kTiny && M <= kTallM && N <= kTileN) {
    tile_m = ceil_div(M, kMr) * kMr, tile_n = ceil_div(N, W) * W;
    best = 0;
  }
  for (int64_t r = least_rows; best > 0 && r < least_rows + kTried && M * N > 0; ++r) {
    const int64_t least_rounds = ceil_div(r * least_cols, threads);
    for (int64_t rounds = least_rounds; rounds < least_rounds + kTried; ++rounds) {
      const int64_t m = ceil_div(ceil_div(M, r), kMr) * kMr, n = width > 0 ? width : ceil_div(ceil_div(N, rounds * threads / r), W) * W;
      const int64_t time = ceil_div(ceil_div(M, m) * ceil_div(N, n), threads) * (m * n + kPacking * (m + n));
      if (time < best) best = time, tile_m = m, tile_n = n;
    }
  }
  rows = ceil_div(M, tile_m);
  cols = ceil_div(N, tile_n);
}

Tile tile_at(const TileGrid& grid, int64_t number) {
  // Down the rows first: neighbours in time read the same part of B.
  const int64_t m0 = number % grid.rows * grid.tile_m, n0 = number / grid.rows * grid.tile_n;
  return {m0, at_most(grid.M - m0, grid.tile_m), n0, at_most(grid.N - n0, grid.tile_n)};
}

float* tile_product(const Product& product, const Tile& tile, const Tile& next, float* scratch) {
  return kBf16Pairs && product.pairs ? typed_product<Pairs>(product, tile, next, scratch) : typed_product<Single>(product, tile, next, scratch);
}

void thin_product(const float* a, int64_t lda, int64_t rows, const void* b, DType dtype, int64_t ldb, int64_t n0, int64_t count, int64_t K,
                  float* out, int64_t ldo) {
  const int64_t at = n0 * ldb;
  if (dtype == DType::bf16) return thin_typed(a, lda, rows, static_cast<const bf16_t*>(b) + at, ldb, count, K, out, ldo);
  if (dtype == DType::f16) return thin_typed(a, lda, rows, static_cast<const f16_t*>(b) + at, ldb, count, K, out, ldo);
  return thin_typed(a, lda, rows, static_cast<const float*>(b) + at, ldb, count, K, out, ldo);
}

}  // namespace longvita::LV_ISA
