// The one matrix product behind the vocabulary head, the cross entropy and the projector: a tile of C = A·B in fp32, by one thread.
//
// Each task of an op owns one tile (at most kTallM × kTileN), sums over all of K in fixed blocks, and then applies the op's own epilogue
// to the fp32 tile while it is in cache. Threads share nothing, and the sum behind an element depends neither on the tile that it falls
// in nor on the thread: results are bit-equal for any number of threads.
//
// Operands are read through RowSource, row by row: rows may be gathered by an index, be made of several strided runs, or be normalised
// on the way; either dimension may be the dense one. They are packed into 32-bit words: one fp32 value, or, where the CPU multiplies
// pairs of bf16, two bf16 values that follow each other in k. bf16 goes from memory to words without becoming fp32 on the way.
//
// m, n, k: rows of C, columns of C, the summed dimension. M, N, K: their sizes.
#pragma once
#include <cstdint>

#include "longvita/dtype.h"
#include "parallel.h"
#include "simd.h"

namespace longvita::LV_ISA {

// ---------------------------------------------------------------------------------------------- operands
constexpr int64_t kLineBytes = 64;

// `count` values at element `offset` of an array, as fp32: a pointer into the array, or to `buffer` after conversion.
const float* widen_row(const void* data, DType dtype, int64_t offset, int64_t count, float* buffer);
// The other way, rounded to nearest even.
void narrow_row(const float* values, int64_t count, void* data, DType dtype, int64_t offset);

// A matrix that gives any part of any row, as fp32 or as bf16: a pointer into the matrix, or to `buffer` (room for count) after conversion.
struct RowSource {
  virtual const float* read(int64_t row, int64_t col, int64_t count, float* buffer) const = 0;
  virtual const bf16_t* read_bf16(int64_t row, int64_t col, int64_t count, bf16_t* buffer) const = 0;
  // Where this element lies in memory, for those who know that they will read it soon; or null.
  virtual const void* where(int64_t, int64_t) const { return nullptr; }
  // Elements between rows, if `where` may be read as a matrix of this type instead of being copied; or 0.
  virtual int64_t in_place(DType) const { return 0; }
};

// A matrix in memory. stride: elements between rows; index: where row r really is, or null.
struct Matrix final : RowSource {
  const void* data;
  DType dtype;
  int64_t stride;
  const int64_t* index;

  Matrix(const void* data, DType dtype, int64_t stride, const int64_t* index = nullptr)
      : data(data), dtype(dtype), stride(stride), index(index) {}
  int64_t offset(int64_t row, int64_t col) const { return (index ? index[row] : row) * stride + col; }
  const float* read(int64_t row, int64_t col, int64_t count, float* buffer) const override {
    return widen_row(data, dtype, offset(row, col), count, buffer);
  }
  const bf16_t* read_bf16(int64_t row, int64_t col, int64_t count, bf16_t* buffer) const override;
  const void* where(int64_t row, int64_t col) const override {
    return static_cast<const char*>(data) + offset(row, col) * int64_t(dtype_size(dtype));
  }
  // An odd number of cache lines apart, rows lie in sets of their own; a power of two apart they would throw each other out of L1 and L2.
  int64_t in_place(DType wanted) const override {
    const bool aligned = reinterpret_cast<uintptr_t>(data) % kLineBytes == 0;
    return aligned && index == nullptr && dtype == wanted && stride * int64_t(dtype_size(dtype)) % (2 * kLineBytes) == kLineBytes ? stride : 0;
  }
};
// Elements between rows of `columns` values in scratch, so that they can be read in place.
inline int64_t in_place_stride(int64_t columns, DType dtype) {
  const int64_t per_line = kLineBytes / int64_t(dtype_size(dtype));
  return ((columns + per_line - 1) / per_line | 1) * per_line;
}

// One side of a product. k_dense: a row of the source runs along k, and its number is m or n; else it runs along m or n, and its number is k.
struct Operand {
  const RowSource& source;
  bool k_dense;
};

// Where C goes: factor · C, rounded once, or (add) added to what stands there.
struct Destination {
  void* data = nullptr;
  DType dtype = DType::f32;
  int64_t stride = 0;
  float factor = 1.0f;
  bool add = false;
};

struct Product {
  Operand a, b;
  int64_t K;
  bool pairs;                         // round the operands to bf16 and multiply two at a time (loses nothing where they are bf16)
  Destination out = {};               // without data: a tile of C stays in the scratch, for the op's own epilogue
};

// ---------------------------------------------------------------------------------------------- tiles
constexpr int64_t kMr = W >= 16 ? 8 : 4;       // register tile: kMr × kNv vectors of sums, and room for kNv of B and one broadcast
constexpr int64_t kNv = 3;
constexpr int64_t kNr = kNv * W;
constexpr int64_t kKc = 192;                   // words of k per block
constexpr int64_t kTileM = W >= 16 ? 768 : 384;   // the block of A stays in L2: 624 KiB of 1 MiB; older CPUs have 512 KiB
constexpr int64_t kTallM = 2 * kTileM;         // a tile may be two blocks of A high, so that B is packed half as often
constexpr int64_t kTileN = 1056;               // the block of B and the tile of C stream from L3: 0.8 and up to 6.2 MiB

// Strides that are no multiple of 4 KiB: whatever is written side by side falls into different sets of L1.
constexpr int64_t kLda = kKc + 16;
constexpr int64_t kPanelA = kMr * kKc + 16;
constexpr int64_t kPanelB = kNr * kKc + 16;
constexpr int64_t kWordsA = kTileM * kLda + kPanelA;
constexpr int64_t kWordsB = kTileN / kNr * kPanelB;
constexpr int64_t kTileFloats = kTallM * kTileN;
constexpr int64_t kRowFloats = kTileN + 16;    // one row of an operand inside a block
constexpr int64_t kScratchFloats = (kWordsA + kWordsB + kTileFloats + W * kRowFloats + 15) / 16 * 16;   // per thread
static_assert(kTileM % kMr == 0 && kTileN % kNr == 0 && kTileM <= kTileN && kKc % W == 0);
static_assert((kTileM / kMr + 1) * kPanelA <= kWordsA);

// How an M × N result is cut into tiles. tile_n: their width, or 0: what keeps all threads busy.
struct TileGrid {
  int64_t M, N, tile_m, tile_n, rows, cols;
  TileGrid(int64_t M, int64_t N, int threads, int64_t tile_n = 0);
  int64_t count() const { return rows * cols; }
};
struct Tile {
  int64_t m0, mt, n0, nt;
};
Tile tile_at(const TileGrid& grid, int64_t number);

// C[m0 : m0+mt, n0 : n0+nt] = Σ_k A[m, k]·B[k, n]. scratch: kScratchFloats, 64-byte aligned. → the tile's first element, rows kTileN
// apart, where it stays in the scratch. next: the tile that this thread is likely to be given next (of size 0: none).
float* tile_product(const Product& product, const Tile& tile, const Tile& next, float* scratch);

constexpr auto kNoEpilogue = [](const Tile&, float*, int64_t) {};

// Every tile of a product on `threads` threads (scratch: kScratchFloats for each): epilogue(tile, c, stride) while it is in cache, unless
// the product has a destination.
template <class Epilogue = decltype(kNoEpilogue)>
void for_each_tile(const Product& product, const TileGrid& grid, int threads, float* scratch, const Epilogue& epilogue = kNoEpilogue) {
  parallel_tasks(grid.count(), threads, grid.M * grid.N * product.K > kWorthThreads, [&](int64_t i) {
    const Tile tile = tile_at(grid, i), next = i + threads < grid.count() ? tile_at(grid, i + threads) : Tile{};
    epilogue(tile, tile_product(product, tile, next, scratch + omp_get_thread_num() * kScratchFloats), kTileN);
  });
}

// out[m, n - n0] = Σ_k a[m, k]·b[n, k] for a few rows m: reads b in place and once, which is what decoding needs.
// a: fp32 rows of stride lda, zero-filled to a whole number of vectors. b: rows of stride ldb.
constexpr int64_t kThinRows = 4;
void thin_product(const float* a, int64_t lda, int64_t rows, const void* b, DType dtype, int64_t ldb, int64_t n0, int64_t count, int64_t K,
                  float* out, int64_t ldo);

}  // namespace longvita::LV_ISA
