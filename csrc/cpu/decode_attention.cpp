// Queries of one key/value head are flattened to rows (query, head of its group) and cut into blocks of up to kRows; the keys that a block
// can see are cut into `splits` ranges. Each (block, range) is one piece of work that gives unnormalised sums, later combined in order.
// How it is cut depends on the sequence alone: not on the threads, not on the rest of the batch.
#include "decode_attention.h"

#include <algorithm>
#include <type_traits>
#include <utility>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "simd.h"

namespace longvita::LV_ISA {
namespace {

constexpr int kRows = 32, kKeys = 64;              // a tile of scores
constexpr int64_t kSplit = 512, kMaxPieces = 64;   // keys per range at least; pieces per sequence and head about at most
constexpr int kRegRows = W == 16 ? 4 : 2;          // register tile of the scores: rows × 4 keys
static_assert(kKeys % W == 0, "a row of scores is whole vectors");

struct Block {
  int64_t sequence, head, row, rows;      // rows of this key/value head, counted over (query, head of the group)
  int64_t first, last;                    // keys that any of the rows can see
  int64_t range, splits, partial;         // keys per range; number of ranges; offset of its partial sums in scratch, in rows
};

struct Plan {
  std::vector<Block> blocks;
  std::vector<std::pair<int32_t, int32_t>> pieces;      // (block, range)
  int64_t partial_rows = 0;
};

int64_t padded(int64_t dim) { return (dim + W - 1) / W * W; }
int64_t thread_floats(int64_t dim) { return (2 * kRows + 2 * kKeys) * padded(dim) + kRows * kKeys + 2 * kKeys + 4 * kRows; }
int64_t partial_floats(int64_t dim) { return padded(dim) + W; }      // sums, then maximum and denominator

struct Keys {
  int64_t first, last;
};

// Keys that query i of n sees in a cache of `length` tokens: the queries are its last n.
Keys visible(const DecodeArgs& args, int64_t i, int64_t n, int64_t length) {
  const int64_t position = length - n + i;
  int64_t first = 0, last = length;
  if (args.causal) last = std::min(last, position + 1);
  if (args.window_right >= 0) last = std::min(last, position + args.window_right + 1);
  if (args.window_left >= 0) first = std::max(first, position - args.window_left);
  return {first, std::max(first, last)};
}

Plan make_plan(const DecodeArgs& args) {
  Plan plan;
  const Sequences& s = args.sequences;
  const int64_t group = args.q.heads / args.cache.heads;
  for (int64_t b = 0; b < s.batch; ++b) {
    const int64_t n = s.offsets[b + 1] - s.offsets[b], rows = n * group, blocks = (rows + kRows - 1) / kRows;
    for (int64_t head = 0; head < args.cache.heads; ++head) {
      for (int64_t row = 0; row < rows; row += kRows) {
        Block block{b, head, row, std::min<int64_t>(kRows, rows - row), 0, 0, 0, 0, plan.partial_rows};
        block.first = visible(args, row / group, n, s.lengths[b]).first;
        block.last = std::max(block.first, visible(args, (row + block.rows - 1) / group, n, s.lengths[b]).last);
        const int64_t keys = block.last - block.first;
        const int64_t wanted = std::min((keys + kSplit - 1) / kSplit, std::max<int64_t>(1, kMaxPieces / blocks));
        block.range = (keys + std::max<int64_t>(1, wanted) - 1) / std::max<int64_t>(1, wanted);
        block.range = std::max<int64_t>(kKeys, (block.range + kKeys - 1) / kKeys * kKeys);
        block.splits = std::max<int64_t>(1, (keys + block.range - 1) / block.range);
        if (block.splits > 1) plan.partial_rows += block.splits * block.rows;
        for (int64_t i = 0; i < block.splits; ++i) plan.pieces.emplace_back(int32_t(plan.blocks.size()), int32_t(i));
        plan.blocks.push_back(block);
      }
    }
  }
  return plan;
}

// ---------------------------------------------------------------------------------------------- reading the cache

LV_INLINE vf from_i8(const int8_t* p) {
  typedef int8_t vb __attribute__((vector_size(W)));
  vb b;
  std::memcpy(&b, p, sizeof b);
  return __builtin_convertvector(b, vf);
}

// The 7 bits of magnitude, shifted into a float's place, are the value times 2^-120.
LV_INLINE vf from_e4m3(const uint8_t* p) {
  typedef uint8_t vb __attribute__((vector_size(W)));
  vb b;
  std::memcpy(&b, p, sizeof b);
  const vu u = __builtin_convertvector(b, vu), magnitude = u & 0x7f;
  const vf value = (vf)(magnitude << 20) * 0x1p120f;
  const vf bounded = select((vi)(magnitude == 0x7f), splat(std::numeric_limits<float>::quiet_NaN()), value);
  return (vf)((vu)bounded | ((u & 0x80) << 24));
}

template <class C>
void widen_row(const C* x, float* out, int64_t dim) {
  int64_t d = 0;
  for (; d + W <= dim; d += W) {
    if constexpr (std::is_same_v<C, int8_t>) store(out + d, from_i8(x + d));
    else if constexpr (std::is_same_v<C, uint8_t>) store(out + d, from_e4m3(x + d));
    else store(out + d, load(x + d));
  }
  if (d < dim) {
    C last[W] = {};
    std::memcpy(last, x + d, size_t(dim - d) * sizeof(C));
    widen_row(last, out + d, W);
  }
}

// Asks for a row ahead of its use: rows of one head lie heads · dim apart, too far for the hardware to guess.
template <class C>
LV_INLINE void prefetch_row(const C* x, int64_t dim) {
  const char* p = reinterpret_cast<const char*>(x);
  for (int64_t i = 0; i < dim * int64_t(sizeof(C)); i += 64) __builtin_prefetch(p + i);
}

// Keys first … first + n of one head as float rows: in place when they already are, else converted into `buffer`.
struct Tile {
  const float* data;
  int64_t stride;
};

template <class C>
Tile read_tile(const KvCache& cache, const CacheSide& side, int64_t b, int64_t head, int64_t first, int n, int64_t end, float* buffer,
               float* factors) {
  const C* base = reinterpret_cast<const C*>(side.data);
  if (side.scale != nullptr) {
    for (int j = 0; j < n; ++j) factors[j] = side.scale_at(cache.row(b, first + j), cache.column(first + j), head);
  }
  for (int64_t j = first + kKeys; j < std::min(end, first + 2 * kKeys); ++j) {
    prefetch_row(base + side.at(cache.row(b, j), cache.column(j), head), cache.dim);
  }
  if constexpr (std::is_same_v<C, float>) {
    if (cache.dim % W == 0 && cache.row(b, first) == cache.row(b, first + n - 1)) {
      return {base + side.at(cache.row(b, first), cache.column(first), head), side.stride_token};
    }
  }
  const int64_t stride = padded(cache.dim);
  for (int j = 0; j < n; ++j) {
    widen_row(base + side.at(cache.row(b, first + j), cache.column(first + j), head), buffer + j * stride, cache.dim);
  }
  return {buffer, stride};
}

Tile read(const KvCache& cache, const CacheSide& side, int64_t b, int64_t head, int64_t first, int n, int64_t end, float* buffer,
          float* factors) {
  switch (cache.dtype) {
    case DType::f32: return read_tile<float>(cache, side, b, head, first, n, end, buffer, factors);
    case DType::bf16: return read_tile<bf16_t>(cache, side, b, head, first, n, end, buffer, factors);
    case DType::f16: return read_tile<f16_t>(cache, side, b, head, first, n, end, buffer, factors);
    case DType::i8: return read_tile<int8_t>(cache, side, b, head, first, n, end, buffer, factors);
    default: return read_tile<uint8_t>(cache, side, b, head, first, n, end, buffer, factors);
  }
}

// ---------------------------------------------------------------------------------------------- arithmetic on tiles

// scores[r][j] = q[r] · k[j] for R rows and 4 keys
template <int R>
LV_INLINE void dot_tile(const float* q, const float* const k[4], int64_t width, float* scores) {
  constexpr int kSums = (4 * R + W - 1) / W * W;      // whole vectors of results
  vf sums[kSums] = {};      // row by row
  for (int64_t d = 0; d < width; d += W) {
    const vf k0 = load(k[0] + d), k1 = load(k[1] + d), k2 = load(k[2] + d), k3 = load(k[3] + d);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const vf x = load(q + r * width + d);
      sums[4 * r] = fma(x, k0, sums[4 * r]);
      sums[4 * r + 1] = fma(x, k1, sums[4 * r + 1]);
      sums[4 * r + 2] = fma(x, k2, sums[4 * r + 2]);
      sums[4 * r + 3] = fma(x, k3, sums[4 * r + 3]);
    }
  }
  float results[kSums];
#pragma GCC unroll 4
  for (int i = 0; i < kSums; i += W) store(results + i, hsum_each(sums + i));
  for (int r = 0; r < R; ++r) std::memcpy(scores + r * kKeys, results + 4 * r, 16);
}

void scores_tile(const float* q, int64_t rows, int64_t width, Tile k, int n, float* scores) {
  for (int j = 0; j < n; j += 4) {
    const float* keys[4];      // past the end: the last key again, masked later
    for (int i = 0; i < 4; ++i) keys[i] = k.data + std::min(j + i, n - 1) * k.stride;
    int64_t r = 0;
    for (; r + kRegRows <= rows; r += kRegRows) dot_tile<kRegRows>(q + r * width, keys, width, scores + r * kKeys + j);
    for (; r < rows; ++r) dot_tile<1>(q + r * width, keys, width, scores + r * kKeys + j);
  }
}

// out[r] = out[r] · keep[r] + Σ_j p[r][j] v[j], for R rows and C vectors of columns
template <int R, int C>
LV_INLINE void sum_tile(const float* p, Tile v, int n, const float* keep, int64_t width, float* out) {
  vf acc[R][C];
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) acc[r][c] = load(out + r * width + c * W) * keep[r];
  }
  for (int j = 0; j < n; ++j) {
    vf x[C];
    for (int c = 0; c < C; ++c) x[c] = load(v.data + j * v.stride + c * W);
    for (int r = 0; r < R; ++r) {
      const vf weight = splat(p[r * kKeys + j]);
      for (int c = 0; c < C; ++c) acc[r][c] = fma(weight, x[c], acc[r][c]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) store(out + r * width + c * W, acc[r][c]);
  }
}

template <int R>
void sum_rows(const float* p, Tile v, int n, const float* keep, int64_t width, float* out) {
  int64_t d = 0;
  for (; d + 2 * W <= width; d += 2 * W) sum_tile<R, 2>(p, {v.data + d, v.stride}, n, keep, width, out + d);
  for (; d < width; d += W) sum_tile<R, 1>(p, {v.data + d, v.stride}, n, keep, width, out + d);
}

void sums_tile(const float* p, int64_t rows, Tile v, int n, const float* keep, int64_t width, float* out) {
  int64_t r = 0;
  const auto some = [&](auto count) {
    constexpr int R = decltype(count)::value;
    for (; r + R <= rows; r += R) sum_rows<R>(p + r * kKeys, v, n, keep + r, width, out + r * width);
  };
  if (rows % 5 == 0) some(std::integral_constant<int, 5>{});      // the group of Qwen2.5-14B: nothing left over
  some(std::integral_constant<int, 4>{});
  some(std::integral_constant<int, 1>{});
}

// One row of scores → weights relative to the new maximum (in units of log2), times the scales of the values. Updates maximum and sum;
// returns the factor that older sums keep.
float soften(const DecodeArgs& args, float* s, int from, int to, const float* k_factors, const float* v_factors, float& maximum,
             float& sum) {
  const vf minus_infinity = splat(-kInf);
  vf top = minus_infinity;
  for (int j = 0; j < kKeys; j += W) {
    vf x = load(s + j) * load(k_factors + j);
    if (args.softcap > 0.0f) x = vtanh(x * (1.0f / args.softcap)) * args.softcap;
    const vi at = iota() + j;
    x = select((at >= from) & (at < to), x * kLog2e, minus_infinity);
    top = vmax(x, top);
    store(s + j, x);
  }
  const float larger = std::max(maximum, hmax(top));
  const float base = larger == -kInf ? 0.0f : larger;
  const float keep = std::exp2(maximum - base);
  vf total = {};
  for (int j = 0; j < kKeys; j += W) {
    const vf weight = vexp2(load(s + j) - base);
    total += weight;
    store(s + j, weight * load(v_factors + j));
  }
  sum = sum * keep + hsum(total);
  maximum = larger;
  return keep;
}

// ---------------------------------------------------------------------------------------------- pieces of work

template <class T>
void load_queries(const DecodeArgs& args, const Block& block, int64_t width, float* q) {
  const int64_t group = args.q.heads / args.cache.heads;
  for (int64_t r = 0; r < block.rows; ++r) {
    const int64_t token = args.sequences.offsets[block.sequence] + (block.row + r) / group;
    const int64_t head = block.head * group + (block.row + r) % group;
    float* out = q + r * width;
    widen_row(reinterpret_cast<const T*>(args.q.data) + token * args.q.stride_token + head * args.q.stride_head, out, args.q.dim);
    for (int64_t d = 0; d < width; d += W) store(out + d, load(out + d) * args.softmax_scale);
  }
}

template <class T>
void write_row(const DecodeArgs& args, const Block& block, int64_t r, const float* sums, float maximum, float total) {
  const int64_t group = args.q.heads / args.cache.heads;
  const int64_t token = args.sequences.offsets[block.sequence] + (block.row + r) / group;
  const int64_t head = block.head * group + (block.row + r) % group;
  const float factor = total > 0.0f ? 1.0f / total : (total == 0.0f ? 0.0f : total);      // nothing seen: 0; NaN stays NaN
  T* out = reinterpret_cast<T*>(args.out.data) + token * args.out.stride_token + head * args.out.stride_head;
  for (int64_t d = 0; d < args.q.dim; d += W) store_n(out + d, load(sums + d) * factor, int(std::min<int64_t>(W, args.q.dim - d)));
  args.lse[head * args.q.tokens + token] = total == 0.0f ? -kInf : (maximum + std::log2(total)) * kLn2;
}

template <class T>
void work(const DecodeArgs& args, const Block& block, int64_t range, float* memory, float* partials) {
  const int64_t width = padded(args.q.dim), group = args.q.heads / args.cache.heads;
  const int64_t length = args.sequences.lengths[block.sequence];
  const int64_t n = args.sequences.offsets[block.sequence + 1] - args.sequences.offsets[block.sequence];
  float *q = memory, *sums = q + kRows * width, *k_buffer = sums + kRows * width, *v_buffer = k_buffer + kKeys * width;
  float *scores = v_buffer + kKeys * width, *k_factors = scores + kRows * kKeys, *v_factors = k_factors + kKeys;
  float *maximum = v_factors + kKeys, *total = maximum + kRows, *keep = total + kRows;
  load_queries<T>(args, block, width, q);
  std::fill(sums, sums + block.rows * width, 0.0f);
  std::fill(k_factors, k_factors + 2 * kKeys, 1.0f);
  std::fill(maximum, maximum + block.rows, -kInf);
  std::fill(total, total + block.rows, 0.0f);
  const int64_t start = block.first + range * block.range, end = std::min(block.last, start + block.range);
  for (int64_t key = start; key < end; key += kKeys) {
    const int keys = int(std::min<int64_t>(kKeys, end - key));
    const Tile k = read(args.cache, args.cache.k, block.sequence, block.head, key, keys, end, k_buffer, k_factors);
    const Tile v = read(args.cache, args.cache.v, block.sequence, block.head, key, keys, end, v_buffer, v_factors);
    scores_tile(q, block.rows, width, k, keys, scores);
    for (int64_t r = 0; r < block.rows; ++r) {
      const Keys seen = visible(args, (block.row + r) / group, n, length);
      const int from = int(std::clamp<int64_t>(seen.first - key, 0, keys)), to = int(std::clamp<int64_t>(seen.last - key, 0, keys));
      keep[r] = soften(args, scores + r * kKeys, from, to, k_factors, v_factors, maximum[r], total[r]);
    }
    sums_tile(scores, block.rows, v, keys, keep, width, sums);
  }
  for (int64_t r = 0; r < block.rows; ++r) {
    if (block.splits == 1) {
      write_row<T>(args, block, r, sums + r * width, maximum[r], total[r]);
      continue;
    }
    float* partial = partials + (block.partial + range * block.rows + r) * partial_floats(args.q.dim);
    std::copy(sums + r * width, sums + (r + 1) * width, partial);
    partial[width] = maximum[r], partial[width + 1] = total[r];
  }
}

// The ranges of a block, in order, into its first range's sums.
template <class T>
void combine(const DecodeArgs& args, const Block& block, float* partials) {
  const int64_t width = padded(args.q.dim), size = partial_floats(args.q.dim);
  for (int64_t r = 0; r < block.rows; ++r) {
    float* sums = partials + (block.partial + r) * size;
    float top = -kInf, total = 0.0f;
    for (int64_t i = 0; i < block.splits; ++i) top = std::max(top, sums[i * block.rows * size + width]);
    const float base = top == -kInf ? 0.0f : top;
    for (int64_t i = 0; i < block.splits; ++i) {
      const float* part = sums + i * block.rows * size;
      const float weight = std::exp2(part[width] - base);
      total += part[width + 1] * weight;
      for (int64_t d = 0; d < width; d += W) {
        store(sums + d, i == 0 ? load(part + d) * weight : fma(load(part + d), splat(weight), load(sums + d)));
      }
    }
    write_row<T>(args, block, r, sums, top, total);
  }
}

template <class T>
void run_typed(const DecodeArgs& args, const Plan& plan) {
  const int64_t pieces = int64_t(plan.pieces.size()), blocks = int64_t(plan.blocks.size());
  float* partials = args.scratch + args.threads * thread_floats(args.q.dim);
  int64_t products = 0;
  for (const Block& block : plan.blocks) products += block.rows * (block.last - block.first) * args.q.dim;
#pragma omp parallel num_threads(args.threads) if (pieces > 1 && products > kWorthThreads / 2)
  {
    int thread = 0;
#ifdef _OPENMP
    thread = omp_get_thread_num();
#endif
    float* memory = args.scratch + thread * thread_floats(args.q.dim);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < pieces; ++i) {
      work<T>(args, plan.blocks[size_t(plan.pieces[size_t(i)].first)], plan.pieces[size_t(i)].second, memory, partials);
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < blocks; ++i) {
      if (plan.blocks[size_t(i)].splits > 1) combine<T>(args, plan.blocks[size_t(i)], partials);
    }
  }
}

int64_t scratch(const DecodeArgs& args) {
  return args.threads * thread_floats(args.q.dim) + make_plan(args).partial_rows * partial_floats(args.q.dim);
}

void run(const DecodeArgs& args) {
  const Plan plan = make_plan(args);
  check(args.scratch_size >= args.threads * thread_floats(args.q.dim) + plan.partial_rows * partial_floats(args.q.dim),
        "decode_attention: scratch too small");
  if (args.dtype == DType::f32) run_typed<float>(args, plan);
  else if (args.dtype == DType::bf16) run_typed<bf16_t>(args, plan);
  else run_typed<f16_t>(args, plan);
}

}  // namespace

extern const DecodeKernels decode_kernels = {&run, &scratch};

}  // namespace longvita::LV_ISA
