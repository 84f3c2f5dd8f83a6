// Queries of one key/value head are flattened to rows (query, head of its group) and cut into blocks of up to kRows; the keys that a block
// can see are cut into `splits` ranges. Each (block, range) is one piece of work that gives unnormalised sums, later combined in order.
// How it is cut depends on the sequence alone: not on the threads, not on the rest of the batch.
//
// A block takes several key/value heads side by side, all of them over a long cache: a token's heads are neighbours in memory, and reading
// them together is what turns jumps of heads · dim into one stream. (Head by head took 1.2 to 1.5 times as long on 131,072 keys.)
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

constexpr int kRows = 32, kKeys = 32;              // a tile of scores; 32 keys of 128 floats are half of L1
constexpr int64_t kSplit = 512, kMaxPieces = 64;   // keys per range at least; pieces per sequence about at most
constexpr int64_t kTogetherKeys = 8192;            // from so many keys on, all heads make one block
constexpr int kTogether = W == 16 ? 4 : 2;         // keys in one register tile of up to 5 rows
static_assert(kKeys % W == 0 && W % kTogether == 0, "a row of scores is whole vectors");

struct Block {
  int64_t sequence, head, heads;          // key/value heads
  int64_t row, rows;                      // of each of them, counted over (query, head of the group)
  int64_t first, last;                    // keys that any of the rows can see
  int64_t range, splits, partial;         // keys per range; number of ranges; offset of its partial sums in scratch, in rows
};

struct Plan {
  std::vector<Block> blocks;
  std::vector<std::pair<int32_t, int32_t>> pieces;      // (block, range)
  int64_t partial_rows = 0;
};

int64_t padded(int64_t dim) { return (dim + W - 1) / W * W; }
int64_t thread_floats(int64_t dim, int64_t heads) {
  return heads * (2 * kRows * padded(dim) + 2 * kRows) + kKeys * padded(dim) + kRows * kKeys + 2 * kKeys + kRows;
}
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
    const int64_t heads = std::clamp<int64_t>(args.cache.heads * s.lengths[b] / kTogetherKeys, 1, args.cache.heads);
    for (int64_t head = 0; head < args.cache.heads; head += heads) {
      for (int64_t row = 0; row < rows; row += kRows) {
        Block block{b, head, std::min(heads, args.cache.heads - head), row, std::min<int64_t>(kRows, rows - row), 0, 0, 0, 0,
                    plan.partial_rows};
        block.first = visible(args, row / group, n, s.lengths[b]).first;
        block.last = std::max(block.first, visible(args, (row + block.rows - 1) / group, n, s.lengths[b]).last);
        const int64_t keys = block.last - block.first;
        const int64_t wanted = std::min((keys + kSplit - 1) / kSplit, std::max<int64_t>(1, kMaxPieces / blocks));
        block.range = (keys + std::max<int64_t>(1, wanted) - 1) / std::max<int64_t>(1, wanted);
        block.range = std::max<int64_t>(kKeys, (block.range + kKeys - 1) / kKeys * kKeys);
        block.splits = std::max<int64_t>(1, (keys + block.range - 1) / block.range);
        if (block.splits > 1) plan.partial_rows += block.splits * block.heads * block.rows;
        for (int64_t i = 0; i < block.splits; ++i) plan.pieces.emplace_back(int32_t(plan.blocks.size()), int32_t(i));
        plan.blocks.push_back(block);
      }
    }
  }
  return plan;
}

// ---------------------------------------------------------------------------------------------- reading the cache

LV_INLINE vf from_i8(const int8_t* p) { return __builtin_convertvector(widen_bytes(p), vf); }

// The 7 bits of magnitude, shifted into a float's place, are the value times 2^-120.
LV_INLINE vf from_e4m3(const uint8_t* p) {
  const vu u = (vu)widen_bytes(p), magnitude = u & 0x7f;
  const vf value = (vf)(magnitude << 20) * 0x1p120f;
  const vf bounded = select((vi)(magnitude == 0x7f), splat(std::numeric_limits<float>::quiet_NaN()), value);
  return (vf)((vu)bounded | ((u & 0x80) << 24));
}

// W values as fp32.
template <class C>
LV_INLINE vf load_wide(const C* x) {
  if constexpr (std::is_same_v<C, int8_t>) return from_i8(x);
  else if constexpr (std::is_same_v<C, uint8_t>) return from_e4m3(x);
  else return load(x);
}

template <class C>
void widen_row(const C* x, float* out, int64_t dim) {
  int64_t d = 0;
  for (; d + W <= dim; d += W) store(out + d, load_wide(x + d));
  if (d < dim) {
    C last[W] = {};
    std::memcpy(last, x + d, size_t(dim - d) * sizeof(C));
    store(out + d, load_wide(last));
  }
}

// The keys, or the values, of one sequence.
template <class C>
struct Rows {
  const KvCache& cache;
  const CacheSide& side;
  int64_t sequence;

  const C* at(int64_t position, int64_t head) const {
    return reinterpret_cast<const C*>(side.data) + side.at(cache.row(sequence, position), cache.column(position), head);
  }
  // Positions first … first + n as fp32 rows one after the other: in the cache, rows of one head lie heads · dim apart, often a power of two,
  // and would fall into a few sets of L1.
  void read(int64_t head, int64_t first, int n, float* buffer) const {
    for (int j = 0; j < n; ++j) widen_row(at(first + j, head), buffer + j * padded(cache.dim), cache.dim);
  }
};

// Asks for the rows of the next tile, in the order of memory and a few at a time, while the present one is computed with; into L2, because
// L1 is full.
template <class C>
struct Ahead {
  const Rows<C>&k, &v;
  int64_t head, heads, position, end;
  int64_t next = 0;      // of 2 · heads rows at `position`

  void ask(int rows) {
    for (; rows > 0 && position < end; --rows) {
      const char* p = reinterpret_cast<const char*>(next < heads ? k.at(position, head + next) : v.at(position, head + next - heads));
      for (int64_t i = 0; i < k.cache.dim * int64_t(sizeof(C)); i += 64) __builtin_prefetch(p + i, 0, 2);
      if (++next == 2 * heads) next = 0, ++position;
    }
  }
};

void read_scales(const KvCache& cache, const CacheSide& side, int64_t b, int64_t head, int64_t first, int count, float* factors) {
  if (side.scale == nullptr) return;
  for (int j = 0; j < count; ++j) factors[j] = side.scale_at(cache.row(b, first + j), cache.column(first + j), head);
}

// ---------------------------------------------------------------------------------------------- arithmetic on tiles

// f(count, first row), count a compile-time 1 to 5: all rows in groups that fill a register tile.
template <class F>
LV_INLINE void in_groups(int64_t rows, F f) {
  const int64_t most = rows % 5 == 0 ? 5 : 4;      // 5: the group of Qwen2.5-14B, with nothing left over
  for (int64_t r = 0; r < rows;) {
    const int64_t now = std::min(most, rows - r);
    switch (now) {
      case 5: f(std::integral_constant<int, 5>{}, r); break;
      case 4: f(std::integral_constant<int, 4>{}, r); break;
      case 3: f(std::integral_constant<int, 3>{}, r); break;
      case 2: f(std::integral_constant<int, 2>{}, r); break;
      default: f(std::integral_constant<int, 1>{}, r);
    }
    r += now;
  }
}

// scores[r][j] = q[r] · k[j] for R rows and W keys
template <int R, class C>
LV_INLINE void dot_tile(const float* q, const C* const k[W], int64_t width, float* scores) {
  vf sums[R][W];
#pragma GCC unroll 1
  for (int j = 0; j < W; j += kTogether) {
    vf acc[R][kTogether] = {};
    for (int64_t d = 0; d < width; d += W) {
      vf x[kTogether];
#pragma GCC unroll 4
      for (int i = 0; i < kTogether; ++i) x[i] = load_wide(k[j + i] + d);
#pragma GCC unroll 5
      for (int r = 0; r < R; ++r) {
        const vf row = load(q + r * width + d);
#pragma GCC unroll 4
        for (int i = 0; i < kTogether; ++i) acc[r][i] = fma(row, x[i], acc[r][i]);
      }
    }
#pragma GCC unroll 5
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int i = 0; i < kTogether; ++i) sums[r][j + i] = acc[r][i];
    }
  }
  for (int r = 0; r < R; ++r) store(scores + r * kKeys, hsum_each(sums[r]));
}

// out[r] = out[r] · keep[r] + Σ_j p[r][j] v[j], for R rows and C vectors of columns
template <int R, int C>
LV_INLINE void sum_tile(const float* p, const float* v, int n, const float* keep, int64_t width, float* out) {
  vf acc[R][C];
#pragma GCC unroll 5
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int c = 0; c < C; ++c) acc[r][c] = load(out + r * width + c * W) * keep[r];
  }
  for (int j = 0; j < n; ++j) {
    vf x[C];
#pragma GCC unroll 2
    for (int c = 0; c < C; ++c) x[c] = load(v + j * width + c * W);
#pragma GCC unroll 5
    for (int r = 0; r < R; ++r) {
      const vf weight = splat(p[r * kKeys + j]);
#pragma GCC unroll 2
      for (int c = 0; c < C; ++c) acc[r][c] = fma(weight, x[c], acc[r][c]);
    }
  }
#pragma GCC unroll 5
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int c = 0; c < C; ++c) store(out + r * width + c * W, acc[r][c]);
  }
}

// All rows against W keys; all rows' sums over n keys of two vectors of columns, or of the last one.
template <class C>
void score_keys(const float* q, int64_t rows, const C* const k[W], int64_t width, float* scores) {
  in_groups(rows, [&](auto count, int64_t r) { dot_tile<decltype(count)::value>(q + r * width, k, width, scores + r * kKeys); });
}
void sum_columns(const float* p, int64_t rows, const float* v, int n, const float* keep, int64_t width, bool two, float* out) {
  in_groups(rows, [&](auto count, int64_t r) {
    constexpr int R = decltype(count)::value;
    if (two) sum_tile<R, 2>(p + r * kKeys, v, n, keep + r, width, out + r * width);
    else sum_tile<R, 1>(p + r * kKeys, v, n, keep + r, width, out + r * width);
  });
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
void load_queries(const DecodeArgs& args, const Block& block, int64_t head, int64_t width, float* q) {
  const int64_t group = args.q.heads / args.cache.heads;
  for (int64_t r = 0; r < block.rows; ++r) {
    const int64_t token = args.sequences.offsets[block.sequence] + (block.row + r) / group;
    const int64_t query_head = (block.head + head) * group + (block.row + r) % group;
    float* out = q + r * width;
    widen_row(reinterpret_cast<const T*>(args.q.data) + token * args.q.stride_token + query_head * args.q.stride_head, out, args.q.dim);
    for (int64_t d = 0; d < width; d += W) store(out + d, load(out + d) * args.softmax_scale);
  }
}

template <class T>
void write_row(const DecodeArgs& args, const Block& block, int64_t head, int64_t r, const float* sums, float maximum, float total) {
  const int64_t group = args.q.heads / args.cache.heads;
  const int64_t token = args.sequences.offsets[block.sequence] + (block.row + r) / group;
  const int64_t query_head = (block.head + head) * group + (block.row + r) % group;
  const float factor = total > 0.0f ? 1.0f / total : (total == 0.0f ? 0.0f : total);      // nothing seen: 0; NaN stays NaN
  T* out = reinterpret_cast<T*>(args.out.data) + token * args.out.stride_token + query_head * args.out.stride_head;
  for (int64_t d = 0; d < args.q.dim; d += W) store_n(out + d, load(sums + d) * factor, int(std::min<int64_t>(W, args.q.dim - d)));
  args.lse[query_head * args.q.tokens + token] = total == 0.0f ? -kInf : (maximum + std::log2(total)) * kLn2;
}

template <class T, class C>
void work(const DecodeArgs& args, const Block& block, int64_t range, float* memory, float* partials) {
  const int64_t dim = args.q.dim, width = padded(dim), group = args.q.heads / args.cache.heads, rows = block.rows;
  const int64_t length = args.sequences.lengths[block.sequence];
  const int64_t n = args.sequences.offsets[block.sequence + 1] - args.sequences.offsets[block.sequence];
  float *q = memory, *sums = q + block.heads * rows * width, *maximum = sums + block.heads * rows * width;
  float *total = maximum + block.heads * rows, *buffer = total + block.heads * rows, *scores = buffer + kKeys * width;
  float *k_factors = scores + kRows * kKeys, *v_factors = k_factors + kKeys, *keep = v_factors + kKeys;
  for (int64_t head = 0; head < block.heads; ++head) load_queries<T>(args, block, head, width, q + head * rows * width);
  std::fill(sums, sums + block.heads * rows * width, 0.0f);
  std::fill(buffer, buffer + kKeys * width, 0.0f);      // rows past the last key are computed with, and masked
  std::fill(k_factors, k_factors + 2 * kKeys, 1.0f);
  std::fill(maximum, maximum + block.heads * rows, -kInf);
  std::fill(total, total + block.heads * rows, 0.0f);
  const int64_t start = block.first + range * block.range, end = std::min(block.last, start + block.range);
  const Rows<C> k{args.cache, args.cache.k, block.sequence}, v{args.cache, args.cache.v, block.sequence};
  const int64_t steps = (width + 2 * W - 1) / (2 * W);      // of the weighted sum, two vectors of columns each
  const bool once = rows <= 5 && dim % W == 0;      // a key meets one register tile only: no need to unpack it first
  const int at_once = int((2 * kKeys + kKeys / W + steps - 1) / (kKeys / W + steps));
  for (int64_t key = start; key < end; key += kKeys) {
    const int keys = int(std::min<int64_t>(kKeys, end - key));
    Ahead<C> ahead{k, v, block.head, block.heads, key + kKeys, std::min(end, key + 2 * kKeys)};
    for (int64_t h = 0; h < block.heads; ++h) {
      const int64_t head = block.head + h, first = h * rows;
      if (!once) k.read(head, key, keys, buffer);
      read_scales(args.cache, args.cache.k, block.sequence, head, key, keys, k_factors);
      read_scales(args.cache, args.cache.v, block.sequence, head, key, keys, v_factors);
      for (int j = 0; j < keys; j += W) {
        ahead.ask(at_once);
        if (once) {
          const C* from[W];
          for (int i = 0; i < W; ++i) from[i] = k.at(key + std::min(j + i, keys - 1), head);
          score_keys(q + first * width, rows, from, width, scores + j);
        } else {
          const float* from[W];
          for (int i = 0; i < W; ++i) from[i] = buffer + (j + i) * width;
          score_keys(q + first * width, rows, from, width, scores + j);
        }
      }
      for (int64_t r = 0; r < rows; ++r) {
        const Keys seen = visible(args, (block.row + r) / group, n, length);
        const int from = int(std::clamp<int64_t>(seen.first - key, 0, keys)), to = int(std::clamp<int64_t>(seen.last - key, 0, keys));
        keep[r] = soften(args, scores + r * kKeys, from, to, k_factors, v_factors, maximum[first + r], total[first + r]);
      }
      v.read(head, key, keys, buffer);
      for (int64_t d = 0; d < width; d += 2 * W) {
        ahead.ask(at_once);
        sum_columns(scores, rows, buffer + d, keys, keep, width, d + 2 * W <= width, sums + first * width + d);
      }
    }
  }
  for (int64_t i = 0; i < block.heads * rows; ++i) {
    if (block.splits == 1) {
      write_row<T>(args, block, i / rows, i % rows, sums + i * width, maximum[i], total[i]);
      continue;
    }
    float* partial = partials + (block.partial + range * block.heads * rows + i) * partial_floats(dim);
    std::copy(sums + i * width, sums + (i + 1) * width, partial);
    partial[width] = maximum[i], partial[width + 1] = total[i];
  }
}

template <class T>
void work(const DecodeArgs& args, const Block& block, int64_t range, float* memory, float* partials) {
  switch (args.cache.dtype) {
    case DType::f32: return work<T, float>(args, block, range, memory, partials);
    case DType::bf16: return work<T, bf16_t>(args, block, range, memory, partials);
    case DType::f16: return work<T, f16_t>(args, block, range, memory, partials);
    case DType::i8: return work<T, int8_t>(args, block, range, memory, partials);
    default: return work<T, uint8_t>(args, block, range, memory, partials);
  }
}

// The ranges of a block, in order, into its first range's sums.
template <class T>
void combine(const DecodeArgs& args, const Block& block, float* partials) {
  const int64_t width = padded(args.q.dim), size = partial_floats(args.q.dim), rows = block.heads * block.rows;
  for (int64_t r = 0; r < rows; ++r) {
    float* sums = partials + (block.partial + r) * size;
    float top = -kInf, total = 0.0f;
    for (int64_t i = 0; i < block.splits; ++i) top = std::max(top, sums[i * rows * size + width]);
    const float base = top == -kInf ? 0.0f : top;
    for (int64_t i = 0; i < block.splits; ++i) {
      const float* part = sums + i * rows * size;
      const float weight = std::exp2(part[width] - base);
      total += part[width + 1] * weight;
      for (int64_t d = 0; d < width; d += W) {
        store(sums + d, i == 0 ? load(part + d) * weight : fma(load(part + d), splat(weight), load(sums + d)));
      }
    }
    write_row<T>(args, block, r / block.rows, r % block.rows, sums, top, total);
  }
}

template <class T>
void run_typed(const DecodeArgs& args, const Plan& plan) {
  const int64_t pieces = int64_t(plan.pieces.size()), blocks = int64_t(plan.blocks.size());
  float* partials = args.scratch + args.threads * thread_floats(args.q.dim, args.cache.heads);
  int64_t products = 0;
  for (const Block& block : plan.blocks) products += block.heads * block.rows * (block.last - block.first) * args.q.dim;
#pragma omp parallel num_threads(args.threads) if (pieces > 1 && products > kWorthThreads / 2)
  {
    int thread = 0;
#ifdef _OPENMP
    thread = omp_get_thread_num();
#endif
    float* memory = args.scratch + thread * thread_floats(args.q.dim, args.cache.heads);
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
  return args.threads * thread_floats(args.q.dim, args.cache.heads) + make_plan(args).partial_rows * partial_floats(args.q.dim);
}

void run(const DecodeArgs& args) {
  const Plan plan = make_plan(args);
  check(args.scratch_size >= args.threads * thread_floats(args.q.dim, args.cache.heads) + plan.partial_rows * partial_floats(args.q.dim),
        "decode_attention: scratch too small");
  if (args.dtype == DType::f32) run_typed<float>(args, plan);
  else if (args.dtype == DType::bf16) run_typed<bf16_t>(args, plan);
  else run_typed<f16_t>(args, plan);
}

}  // namespace

extern const DecodeKernels decode_kernels = {&run, &scratch};

}  // namespace longvita::LV_ISA
