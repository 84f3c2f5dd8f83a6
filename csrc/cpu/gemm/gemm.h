// The one matrix product behind the vocabulary head, the cross entropy and the projector: a tile of C = A·B in fp32, by one thread.
//
// Each task of an op owns one tile (at most kTileM × kTileN), sums over all of K in fixed blocks, and then applies the op's own epilogue
// to the fp32 tile while it is in cache. Threads share nothing, and the sum behind an element depends neither on the tile that it falls
// in nor on the thread: results are bit-equal for any number of threads.
//
// Operands are read through RowSource, row by row: rows may be gathered by an index, be made of several strided runs, or be normalised
// on the way; either dimension may be the dense one. They are packed into 32-bit words: one fp32 value, or, where the CPU multiplies
// pairs of bf16, two bf16 values that follow each other in k.
//
// m, n, k: rows of C, columns of C, the summed dimension. M, N, K: their sizes.
#pragma once
#include <omp.h>

#include <cstdint>

#include "longvita/dtype.h"
#include "simd.h"

namespace longvita::LV_ISA {

// ---------------------------------------------------------------------------------------------- operands
// A matrix that gives any part of any row as fp32.
struct RowSource {
  // `count` values of `row` from column `col` on: a pointer into the matrix, or to `buffer` (room for count) after conversion.
  virtual const float* read(int64_t row, int64_t col, int64_t count, float* buffer) const = 0;
  // The same part will be read soon. Short pieces of far-apart rows are more than the hardware foresees.
  virtual void prefetch(int64_t, int64_t, int64_t) const {}
};

// `count` values at element `offset` of an array, as fp32.
const float* widen_row(const void* data, DType dtype, int64_t offset, int64_t count, float* buffer);
// The other way, rounded to nearest even.
void narrow_row(const float* values, int64_t count, void* data, DType dtype, int64_t offset);

// A matrix in memory. stride: elements between rows; index: where row r really is, or null.
struct Matrix final : RowSource {
  const void* data;
  DType dtype;
  int64_t stride;
  const int64_t* index;

  Matrix(const void* data, DType dtype, int64_t stride, const int64_t* index = nullptr)
      : data(data), dtype(dtype), stride(stride), index(index) {}
  const float* read(int64_t row, int64_t col, int64_t count, float* buffer) const override {
    return widen_row(data, dtype, (index ? index[row] : row) * stride + col, count, buffer);
  }
  void prefetch(int64_t row, int64_t col, int64_t count) const override {
    const char* from = static_cast<const char*>(data) + ((index ? index[row] : row) * stride + col) * int64_t(dtype_size(dtype));
    for (int64_t i = 0; i < count * int64_t(dtype_size(dtype)); i += 64) __builtin_prefetch(from + i);
  }
};

// One side of a product. k_dense: a row of the source runs along k, and its number is m or n; else it runs along m or n, and its number is k.
struct Operand {
  const RowSource& source;
  bool k_dense;
};

// ---------------------------------------------------------------------------------------------- tiles
constexpr int64_t kMr = W >= 16 ? 12 : 6;      // register tile: kMr × kNv vectors of sums; leaves registers for B and one broadcast
constexpr int64_t kNv = 2;
constexpr int64_t kNr = kNv * W;
constexpr int64_t kKc = W >= 16 ? 192 : 256;   // words of k per block: one panel of B (kNr × kKc words) stays in L1
constexpr int64_t kTileM = 192;                // blocks of A and B and the tile itself: under 700 KiB, for 1 MiB of L2
constexpr int64_t kTileN = 256;

constexpr int64_t kLda = kKc + 16;                     // not a power of two: rows of a register tile fall into different sets of L1
constexpr int64_t kPanelA = kMr * kKc + 2 * W;         // panels are written in whole vectors, which run over the end
constexpr int64_t kPanelB = kNr * kKc;
constexpr int64_t kRowFloats = 2 * kKc + 2 * W;        // one row of an operand inside a block
constexpr int64_t kWordsA = kTileM * kLda + 2 * W;
constexpr int64_t kWordsB = kTileN * kKc;
constexpr int64_t kTileFloats = kTileM * kTileN;
constexpr int64_t kScratchFloats = (kWordsA + kWordsB + kTileFloats + 8 * kRowFloats + 15) / 16 * 16;   // per thread
static_assert(kTileM % kMr == 0 && kTileN % kNr == 0 && kNr % 4 == 0);
static_assert(kTileM / kMr * kPanelA <= kWordsA && kRowFloats >= kTileN && kRowFloats >= kTileM);

// How an M × N result is cut into tiles: at most kTileM × kTileN, smaller (down to min_n columns) where that would leave threads idle.
struct TileGrid {
  int64_t M, N, tile_m, tile_n, rows, cols;
  TileGrid(int64_t M, int64_t N, int threads, int64_t min_n = 64);
  int64_t count() const { return rows * cols; }
};
struct Tile {
  int64_t m0, mt, n0, nt;
};
Tile tile_at(const TileGrid& grid, int64_t number);

// C[m0 : m0+mt, n0 : n0+nt] = Σ_k A[m, k]·B[k, n] as fp32 with row stride kTileN, inside `scratch` (kScratchFloats, 64-byte aligned).
// pairs: round the operands to bf16 and multiply two at a time (loses nothing where they are bf16); ignored where the CPU cannot.
float* tile_product(const Operand& a, const Operand& b, const Tile& tile, int64_t K, bool pairs, float* scratch);

// Every tile of an M × N product on `threads` threads (scratch: kScratchFloats for each): epilogue(tile, c) while it is in cache.
template <class Epilogue>
void for_each_tile(const Operand& a, const Operand& b, const TileGrid& grid, int64_t K, bool pairs, int threads, float* scratch,
                   const Epilogue& epilogue) {
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (grid.count() > 1 && grid.M * grid.N * K > kWorthThreads)
  for (int64_t i = 0; i < grid.count(); ++i) {
    const Tile tile = tile_at(grid, i);
    epilogue(tile, tile_product(a, b, tile, K, pairs, scratch + omp_get_thread_num() * kScratchFloats));
  }
}

// out[m, n - n0] = Σ_k a[m, k]·b[n, k] for a few rows m: reads b in place and once, which is what decoding needs.
// a: fp32 rows of stride lda, zero-filled to a whole number of vectors. b: rows of stride ldb.
constexpr int64_t kThinRows = 4;
void thin_product(const float* a, int64_t lda, int64_t rows, const void* b, DType dtype, int64_t ldb, int64_t n0, int64_t count, int64_t K,
                  float* out, int64_t ldo);

}  // namespace longvita::LV_ISA
