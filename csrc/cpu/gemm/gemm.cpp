#include "gemm/gemm.h"

#include <cstring>

namespace longvita::LV_ISA {
namespace {

LV_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
LV_INLINE int64_t at_most(int64_t a, int64_t limit) { return a < limit ? a : limit; }

// ---------------------------------------------------------------------------------------------- what a word is
struct Single {                       // one fp32 value
  static constexpr int64_t kDepth = 1;
  static const float* along_k(const float* row, int64_t, float*) { return row; }
  static const float* across_k(const float* row, const float*, int64_t, float*) { return row; }
  LV_INLINE vf multiply_add(vf sum, float a, vf b) { return b * a + sum; }
};

struct Pairs {                        // two bf16 values, k and k + 1
  static constexpr int64_t kDepth = 2;
  static const float* along_k(const float* row, int64_t count, float* words) {
    bf16_t* out = reinterpret_cast<bf16_t*>(words);
    narrow_row(row, count, out, DType::bf16, 0);
    if (count % 2) out[count].bits = 0;
    return words;
  }
  static const float* across_k(const float* even, const float* odd, int64_t count, float* words) {
    for (int64_t i = 0; i < count; i += W) {
      const int lanes = int(at_most(count - i, W));
      store_n(words + i, (vf)pack_pairs(load_n(even + i, lanes), odd ? load_n(odd + i, lanes) : vf{}), lanes);
    }
    return words;
  }
  LV_INLINE vf multiply_add(vf sum, float a, vf b) {
    uint32_t bits;
    std::memcpy(&bits, &a, 4);
    return dot_pairs(sum, vu{} + bits, (vu)b);
  }
};

// ---------------------------------------------------------------------------------------------- packing
// A block of one operand: `count` rows or columns of C from `first`, values k0 … k0+depth of k, which make `words` words.
struct Block {
  int64_t first, count, k0, depth, words;
};

// Rows run along k: keeps them as rows, kLda apart, zero rows up to a whole register tile.
template <class Path>
void pack_rows(const RowSource& source, const Block& block, float* out, float* rows) {
  for (int64_t i = 0; i < block.count; ++i) {
    if (i + 2 < block.count) source.prefetch(block.first + i + 2, block.k0, block.depth);
    const float* row = source.read(block.first + i, block.k0, block.depth, rows);
    std::memcpy(out + i * kLda, Path::along_k(row, block.depth, rows + kRowFloats), size_t(block.words) * 4);
  }
  for (int64_t i = block.count; i < ceil_div(block.count, kMr) * kMr; ++i) std::memset(out + i * kLda, 0, size_t(block.words) * 4);
}

LV_INLINE void transpose_4x4(const float* const rows[4], int64_t at, float* out, int64_t stride) {
  typedef float v4 __attribute__((vector_size(16)));
  typedef int32_t i4 __attribute__((vector_size(16)));
  v4 r[4];
  for (int i = 0; i < 4; ++i) std::memcpy(&r[i], rows[i] + at, 16);
  const v4 a = __builtin_shuffle(r[0], r[1], i4{0, 4, 1, 5}), b = __builtin_shuffle(r[0], r[1], i4{2, 6, 3, 7});
  const v4 c = __builtin_shuffle(r[2], r[3], i4{0, 4, 1, 5}), d = __builtin_shuffle(r[2], r[3], i4{2, 6, 3, 7});
  const v4 columns[4] = {__builtin_shuffle(a, c, i4{0, 1, 4, 5}), __builtin_shuffle(a, c, i4{2, 3, 6, 7}),
                         __builtin_shuffle(b, d, i4{0, 1, 4, 5}), __builtin_shuffle(b, d, i4{2, 3, 6, 7})};
  for (int i = 0; i < 4; ++i) std::memcpy(out + i * stride, &columns[i], 16);
}

// Rows run along k: into panels of kNr columns, transposed four rows at a time.
template <class Path>
void pack_transposed(const RowSource& source, const Block& block, float* out, float* rows) {
  for (int64_t j = 0; j < ceil_div(block.count, kNr) * kNr; j += 4) {
    const float* four[4];
    for (int64_t i = 4; i < 8 && j + i < block.count; ++i) source.prefetch(block.first + j + i, block.k0, block.depth);
    for (int64_t i = 0; i < 4; ++i) {
      float* buffer = rows + i * kRowFloats;
      if (j + i < block.count) {
        const float* row = source.read(block.first + j + i, block.k0, block.depth, buffer);
        four[i] = Path::along_k(row, block.depth, buffer + 4 * kRowFloats);
      } else {
        std::memset(buffer, 0, size_t(block.words) * 4);
        four[i] = buffer;
      }
    }
    float* panel = out + j / kNr * kPanelB + j % kNr;
    int64_t k = 0;
    for (; k + 4 <= block.words; k += 4) transpose_4x4(four, k, panel + k * kNr, kNr);
    for (; k < block.words; ++k) {
      for (int i = 0; i < 4; ++i) panel[k * kNr + i] = four[i][k];
    }
  }
}

// Rows run across k: cut into panels of `width`. Whole vectors are copied; what runs over is written again by the next row.
template <class Path, int64_t kWidth, int64_t kPanel>
void pack_panels(const RowSource& source, const Block& block, float* out, float* rows) {
  constexpr int64_t kVectors = (kWidth + W - 1) / W, kAhead = 8;
  for (int64_t k = 0; k < block.words; ++k) {
    const int64_t from = block.k0 + k * Path::kDepth, soon = from + kAhead * Path::kDepth;
    if (soon + Path::kDepth <= block.k0 + block.depth) {
      for (int64_t i = 0; i < Path::kDepth; ++i) source.prefetch(soon + i, block.first, block.count);
    }
    const float* even = source.read(from, block.first, block.count, rows);
    const float* odd = nullptr;
    if (Path::kDepth == 2 && from + 1 < block.k0 + block.depth) odd = source.read(from + 1, block.first, block.count, rows + kRowFloats);
    const float* row = Path::across_k(even, odd, block.count, rows + 2 * kRowFloats);
    float* panel = out + k * kWidth;
    int64_t i = 0;
    for (; i + kVectors * W <= block.count; i += kWidth, panel += kPanel) {
      for (int64_t v = 0; v < kVectors; ++v) store(panel + v * W, load(row + i + v * W));
    }
    for (; i < block.count; i += kWidth, panel += kPanel) {
      for (int64_t c = 0; c < kWidth; ++c) panel[c] = i + c < block.count ? row[i + c] : 0.0f;
    }
  }
}

// ---------------------------------------------------------------------------------------------- register tile
// c[kMr, kNr] (+)= a · b over `words` words. a: rows kLda apart (kRows) or a panel of kMr; b: a panel of kNr.
template <class Path, bool kRows>
void register_tile(int64_t words, const float* a, const float* b, float* c, bool add) {
  vf sum[kMr][kNv];
#pragma GCC unroll 16
  for (int64_t i = 0; i < kMr; ++i) {
#pragma GCC unroll 4
    for (int64_t j = 0; j < kNv; ++j) sum[i][j] = vf{};
  }
  for (int64_t k = 0; k < words; ++k) {
    vf bv[kNv];
#pragma GCC unroll 4
    for (int64_t j = 0; j < kNv; ++j) bv[j] = load(b + j * W);
#pragma GCC unroll 16
    for (int64_t i = 0; i < kMr; ++i) {
      const float av = kRows ? a[i * kLda] : a[i];
#pragma GCC unroll 4
      for (int64_t j = 0; j < kNv; ++j) sum[i][j] = Path::multiply_add(sum[i][j], av, bv[j]);
    }
    a += kRows ? 1 : kMr;
    b += kNr;
  }
#pragma GCC unroll 16
  for (int64_t i = 0; i < kMr; ++i) {
#pragma GCC unroll 4
    for (int64_t j = 0; j < kNv; ++j) {
      float* out = c + i * kTileN + j * W;
      store(out, add ? load(out) + sum[i][j] : sum[i][j]);
    }
  }
}

template <class Path>
float* product(const Operand& a, const Operand& b, const Tile& tile, int64_t K, float* scratch) {
  float* packed_a = scratch;
  float* packed_b = packed_a + kWordsA;
  float* c = packed_b + kWordsB;
  float* rows = c + kTileFloats;
  if (K == 0) std::memset(c, 0, size_t(kTileFloats) * 4);
  for (int64_t k0 = 0; k0 < K; k0 += kKc * Path::kDepth) {
    const int64_t depth = at_most(K - k0, kKc * Path::kDepth), words = ceil_div(depth, Path::kDepth);
    const Block block_a = {tile.m0, tile.mt, k0, depth, words}, block_b = {tile.n0, tile.nt, k0, depth, words};
    if (a.k_dense) pack_rows<Path>(a.source, block_a, packed_a, rows);
    else pack_panels<Path, kMr, kPanelA>(a.source, block_a, packed_a, rows);
    if (b.k_dense) pack_transposed<Path>(b.source, block_b, packed_b, rows);
    else pack_panels<Path, kNr, kPanelB>(b.source, block_b, packed_b, rows);
    for (int64_t j = 0; j < tile.nt; j += kNr) {        // a panel of B stays in L1 while the rows of A stream past it
      const float* panel_b = packed_b + j / kNr * kPanelB;
      for (int64_t i = 0; i < tile.mt; i += kMr) {
        float* out = c + i * kTileN + j;
        if (a.k_dense) register_tile<Path, true>(words, packed_a + i * kLda, panel_b, out, k0 > 0);
        else register_tile<Path, false>(words, packed_a + i / kMr * kPanelA, panel_b, out, k0 > 0);
      }
    }
  }
  return c;
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

TileGrid::TileGrid(int64_t M, int64_t N, int threads, int64_t min_n) : M(M), N(N), tile_m(kTileM), tile_n(kTileN) {
  const int64_t wanted = threads > 1 ? 4 * int64_t(threads) : 1;
  while (tile_n > min_n && ceil_div(M, tile_m) * ceil_div(N, tile_n) < wanted) tile_n /= 2;
  while (tile_m > 48 && ceil_div(M, tile_m) * ceil_div(N, tile_n) < wanted) tile_m /= 2;
  tile_m = ceil_div(ceil_div(M, ceil_div(M, tile_m) + (M == 0)), kMr) * kMr;     // even out
  if (tile_m == 0) tile_m = kMr;
  rows = ceil_div(M, tile_m);
  cols = ceil_div(N, tile_n);
}

Tile tile_at(const TileGrid& grid, int64_t number) {
  // Down the rows first: neighbours in time read the same part of B.
  const int64_t m0 = number % grid.rows * grid.tile_m, n0 = number / grid.rows * grid.tile_n;
  return {m0, at_most(grid.M - m0, grid.tile_m), n0, at_most(grid.N - n0, grid.tile_n)};
}

float* tile_product(const Operand& a, const Operand& b, const Tile& tile, int64_t K, bool pairs, float* scratch) {
  if (kBf16Pairs && pairs) return product<Pairs>(a, b, tile, K, scratch);
  return product<Single>(a, b, tile, K, scratch);
}

void thin_product(const float* a, int64_t lda, int64_t rows, const void* b, DType dtype, int64_t ldb, int64_t n0, int64_t count, int64_t K,
                  float* out, int64_t ldo) {
  const int64_t at = n0 * ldb;
  if (dtype == DType::bf16) return thin_typed(a, lda, rows, static_cast<const bf16_t*>(b) + at, ldb, count, K, out, ldo);
  if (dtype == DType::f16) return thin_typed(a, lda, rows, static_cast<const f16_t*>(b) + at, ldb, count, K, out, ldo);
  return thin_typed(a, lda, rows, static_cast<const float*>(b) + at, ldb, count, K, out, ldo);
}

}  // namespace longvita::LV_ISA
