// The pieces of decode_plan.h, each by the arithmetic of decode_tiles.h that fits it, or as decode_stream.h has it; then joined in order.
#include "decode_attention.h"

#include <algorithm>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "decode_plan.h"
#include "decode_stream.h"
#include "decode_tiles.h"
#include "parallel.h"

namespace longvita::LV_ISA {
namespace {

// ---------------------------------------------------------------------------------------------- reading the cache

// Scales of `count` keys of all heads, and 0 behind them.
void read_scales(const KvCache& cache, const CacheSide& side, const Block& block, int64_t first, int count, float* factors) {
  for (int j = 0; j < kKeys; ++j) {
    const int64_t at = first + std::min(j, count - 1), row = cache.row(block.sequence, at), column = cache.column(at);
    for (int64_t h = 0; h < block.heads; ++h) {
      factors[h * kKeys + j] = j < count ? side.scale_at(row, column, block.head + h) : 0.0f;
    }
  }
}

// ---------------------------------------------------------------------------------------------- pieces of work

// Row r of a head, counted over the block: query, head of the group.
template <class T>
const T* query(const DecodeArgs& args, const Block& block, int64_t head, int64_t r) {
  const int64_t group = args.q.heads / args.cache.heads, token = args.sequences.offsets[block.sequence] + (block.row + r) / group;
  const int64_t query_head = (block.head + head) * group + (block.row + r) % group;
  return reinterpret_cast<const T*>(args.q.data) + token * args.q.stride_token + query_head * args.q.stride_head;
}

// Queries as operands; what is left to multiply their products by goes to q_step.
template <class A, class T>
void load_queries(const DecodeArgs& args, const Block& block, const Scratch& own) {
  const int64_t dim = args.q.dim, width = padded(dim);
  for (int64_t i = 0; i < block.heads * block.rows; ++i) {
    const T* from = query<T>(args, block, i / block.rows, i % block.rows);
    own.q_step[i] = args.softmax_scale;
    if constexpr (std::is_same_v<A, Wide>) {
      unpack_row<Wide>(from, dim, own.q + i * width);
    } else if constexpr (std::is_same_v<A, Pairs>) {
      std::memcpy(reinterpret_cast<bf16_t*>(own.q) + i * width, from, size_t(dim) * sizeof(T));
    } else {
      // a sign and 15 bits, by a power of two: elements down to 1/128 of the largest stay as they are
      vf top = {}, poison = {};
      for (int64_t d = 0; d < dim; d += W) {
        const vf x = load(from + d);
        top = vmax(vabs(x), top), poison += x * 0.0f;
      }
      const float factor = std::exp2(float(std::min(14 - std::ilogb(std::max(hmax(top), 0x1p-80f)), 94)));
      for (int64_t d = 0; d < dim; d += W) {
        const vh words = __builtin_convertvector(pack_words(load(from + d) * factor, vf{}), vh);
        std::memcpy(reinterpret_cast<int16_t*>(own.q) + i * width + d, &words, sizeof words);
      }
      own.q_step[i] = args.softmax_scale / factor + hsum(poison);      // NaN where a query is not finite
    }
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

template <class A, class X>
void score_tile(const typename A::Unpacked* q, int64_t rows, const X* const k[kKeys], int keys, int64_t width, float* scores,
                Ahead& ahead) {
  for (int j = 0; j < keys; j += W) score_keys<A>(q, rows, k + j, width, scores + j, ahead);
}
template <class A, class X>
void sum_tile_columns(const float* p, int64_t rows, const X* const v[kKeys], int keys, const float* keep, const float* gain, int64_t width,
                      float* sums, Ahead& ahead) {
  const int steps = A::kColumns == W ? keys : std::min(keys, W);
  for (int64_t column = 0; column < width;) column = sum_columns<A>(p, rows, v, steps, column, keep, gain, width, sums, ahead);
}

// Words: the values' scales relative to the largest of the tile, which goes to v_step.
void scale_to_words(const Block& block, const Scratch& own) {
  for (int64_t h = 0; h < block.heads; ++h) {
    float* factors = own.v_factors + h * kKeys;
    vf top = {};
    for (int j = 0; j < kKeys; j += W) top = vmax(vabs(load(factors + j)), top);
    const float largest = hmax(top), factor = largest > 0.0f ? kLargestWord / largest : 0.0f;
    for (int j = 0; j < kKeys; j += W) store(factors + j, load(factors + j) * factor);
    std::fill_n(own.v_step + h * block.rows, block.rows, largest / kLargestWord);
  }
}

void clear(const Scratch& own, int64_t rows, int64_t width) {
  std::fill(own.sums, own.sums + rows * width, 0.0f);
  std::fill(own.v_rows + kKeys * width, own.v_rows + (kKeys + 1) * width, 0.0f);
  for (int64_t i = 0; i < (rows + W - 1) / W * W; ++i) own.maximum[i] = -kInf, own.total[i] = 0.0f, own.v_step[i] = 1.0f;
}

// Straight to the output, or where the ranges of the block meet.
template <class T>
void hand_over(const DecodeArgs& args, const Block& block, int64_t range, const Scratch& own, float* partials, bool dealt) {
  const int64_t width = padded(args.q.dim), all = block.heads * block.rows;
  for (int64_t i = 0; i < all; ++i) {
    float* const sums = own.sums + i * width;
    if (dealt) straighten(sums, width);
    if (block.splits == 1) {
      write_row<T>(args, block, i / block.rows, i % block.rows, sums, own.maximum[i], own.total[i]);
      continue;
    }
    float* partial = partials + (block.partial + range * all + i) * partial_floats(args.q.dim);
    std::copy(sums, sums + width, partial);
    partial[width] = own.maximum[i], partial[width + 1] = own.total[i];
  }
}

template <class A, class C, class T>
void work(const DecodeArgs& args, const Block& block, int64_t range, const Scratch& own, float* partials) {
  using U = typename A::Unpacked;
  const int64_t dim = args.q.dim, width = padded(dim), group = args.q.heads / args.cache.heads, rows = block.rows;
  const int64_t length = args.sequences.lengths[block.sequence];
  const int64_t n = args.sequences.offsets[block.sequence + 1] - args.sequences.offsets[block.sequence];
  const bool scaled = args.cache.k.scale != nullptr;
  U *const q = reinterpret_cast<U*>(own.q);
  U *const k_rows = reinterpret_cast<U*>(own.k_rows), *const v_rows = reinterpret_cast<U*>(own.v_rows);
  clear(own, block.heads * rows, width);
  load_queries<A, T>(args, block, own);
  Keys seen[kRows];
  for (int64_t r = 0; r < rows; ++r) seen[r] = visible(args, (block.row + r) / group, n, length);
  const Softmax softmax = {own.maximum, own.total, own.keep, own.gain, own.q_step, own.v_step};
  const int64_t start = block.first + range * block.range, end = std::min(block.last, start + block.range);
  if constexpr (kBf16Pairs && A::kColumns != W) {
    if (streams(args, block) && start < end) {
      stream<A, C>(args, block, start, end, seen, own);
      return hand_over<T>(args, block, range, own, partials, true);
    }
  }
  const bool in_place = rows <= 5 && dim % A::kColumns == 0;      // a row meets one register tile only: no need to unpack it first
  for (int64_t key = start; key < end; key += kKeys) {
    const int keys = int(std::min<int64_t>(kKeys, end - key));
    Ahead ahead{args.cache, block.sequence, block.head, block.heads, key + kKeys, std::min(end, key + 2 * kKeys)};
    const C *k_first[kKeys], *v_first[kKeys], *raw[kKeys];      // of the block's first head
    const U* unpacked[kKeys];
    for (int j = 0; j < kKeys; ++j) {
      const int64_t at = key + std::min(j, keys - 1), row = args.cache.row(block.sequence, at), column = args.cache.column(at);
      k_first[j] = reinterpret_cast<const C*>(args.cache.k.data) + args.cache.k.at(row, column, block.head);
      v_first[j] = reinterpret_cast<const C*>(args.cache.v.data) + args.cache.v.at(row, column, block.head);
    }
    for (int64_t h = 0; h < block.heads; ++h) {
      for (int j = 0; j < kKeys; ++j) raw[j] = k_first[j] + h * args.cache.k.stride_head;
      const U* const q_head = q + h * rows * width;
      float* const scores = own.scores + h * rows * kKeys;
      if (in_place) {
        score_tile<A>(q_head, rows, raw, keys, width, scores, ahead);
      } else {
        for (int j = 0; j < kKeys; ++j) unpacked[j] = unpack_row<A>(raw[j], dim, k_rows + j * width);
        score_tile<A>(q_head, rows, unpacked, keys, width, scores, ahead);
      }
    }
    if (scaled) {
      read_scales(args.cache, args.cache.k, block, key, keys, own.k_factors);
      read_scales(args.cache, args.cache.v, block, key, keys, own.v_factors);
      if constexpr (std::is_same_v<A, Words>) scale_to_words(block, own);
    }
    int from[kRows], to[kRows];
    bool whole = keys == kKeys;
    for (int64_t r = 0; r < rows; ++r) {
      from[r] = int(std::clamp<int64_t>(seen[r].first - key, 0, keys)), to[r] = int(std::clamp<int64_t>(seen[r].last - key, 0, keys));
      whole = whole && from[r] == 0 && to[r] == kKeys;
    }
    soften<A>({args.softcap, whole, from, to, block.heads, rows, own.scores, scaled ? own.k_factors : nullptr,
               scaled ? own.v_factors : nullptr}, softmax);
    for (int64_t h = 0; h < block.heads; ++h) {
      for (int j = 0; j < keys; ++j) raw[j] = v_first[j] + h * args.cache.v.stride_head;
      for (int j = keys; j < kKeys; ++j) raw[j] = reinterpret_cast<const C*>(own.v_rows + kKeys * width);
      const float *p = own.scores + h * rows * kKeys, *keep = own.keep + h * rows, *gain = own.gain + h * rows;
      float* const sums = own.sums + h * rows * width;
      if (in_place) {
        sum_tile_columns<A>(p, rows, raw, keys, keep, gain, width, sums, ahead);
      } else {
        for (int j = 0; j < kKeys; ++j) unpacked[j] = unpack_row<A>(raw[j], dim, v_rows + j * width);
        sum_tile_columns<A>(p, rows, unpacked, keys, keep, gain, width, sums, ahead);
      }
    }
  }
  hand_over<T>(args, block, range, own, partials, A::kColumns != W);
}

template <class T>
void work(const DecodeArgs& args, const Block& block, int64_t range, float* memory, float* partials) {
  const Scratch own(memory, args.q.dim, args.cache.heads);
  if constexpr (kBf16Pairs && std::is_same_v<T, bf16_t>) {
    if (args.q.dim % Pairs::kColumns == 0) {
      if (args.cache.dtype == DType::bf16) return work<Pairs, bf16_t, T>(args, block, range, own, partials);
      if (args.cache.dtype == DType::i8) return work<Words, int8_t, T>(args, block, range, own, partials);
    }
  }
  switch (args.cache.dtype) {
    case DType::f32: return work<Wide, float, T>(args, block, range, own, partials);
    case DType::bf16: return work<Wide, bf16_t, T>(args, block, range, own, partials);
    case DType::f16: return work<Wide, f16_t, T>(args, block, range, own, partials);
    case DType::i8: return work<Wide, int8_t, T>(args, block, range, own, partials);
    default: return work<Wide, uint8_t, T>(args, block, range, own, partials);
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
  const bool worth = products > kWorthThreads / 2;
  parallel_tasks(pieces, args.threads, worth, [&](int64_t i) {
    const auto& [block, range] = plan.pieces[size_t(i)];
    float* memory = args.scratch + omp_get_thread_num() * thread_floats(args.q.dim, args.cache.heads);
    work<T>(args, plan.blocks[size_t(block)], range, memory, partials);
  });
  parallel_tasks(plan.partial_rows > 0 ? blocks : 0, args.threads, worth, [&](int64_t i) {
    if (plan.blocks[size_t(i)].splits > 1) combine<T>(args, plan.blocks[size_t(i)], partials);
  });
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
