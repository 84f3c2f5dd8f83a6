// A long cache at the speed of memory: few queries a key/value head, head dimension kStreamDim, bf16 or int8 cache on a CPU that multiplies pairs.
//
// The steps of decode_tiles.h one after the other leave memory idle while they do not ask for the next tile, and ask in an order that suits the
// arithmetic. Here two tiles are under way at a time. One step of the loop
//
//   * adds two keys' values of the present tile to sums that live in registers, which needs lines that L2 holds by then, and
//   * scores one head of one key of the next tile, and asks for what lies kAheadBytes behind it and behind its values.
//
// So memory is asked evenly, in the order of its addresses, and multiply-adds are always there to hide behind.
//
// Between tiles stands softmax. A slot is a row of a head (head · R + row): scores are kept key by key, slots side by side, so that maxima and
// sums over keys are taken lane by lane.
#pragma once
#include "decode_plan.h"
#include "decode_tiles.h"

namespace longvita::LV_ISA {
namespace {

static_assert(!kBf16Pairs || kStreamDim / (kTogether * W) * W == kKeys, "as many steps read a head of a key as sum one of two pieces of a head");

// Where the rows of a tile's keys begin, first head.
template <class C>
struct TileRows {
  const C *k[kKeys], *v[kKeys];
  int keys;      // that exist; the last is repeated behind them

  TileRows(const KvCache& cache, const Block& block, int64_t first, int64_t end) : keys(int(std::min<int64_t>(kKeys, end - first))) {
    for (int j = 0; j < kKeys; ++j) {
      const int64_t at = first + std::min(j, keys - 1), row = cache.row(block.sequence, at), column = cache.column(at);
      k[j] = reinterpret_cast<const C*>(cache.k.data) + cache.k.at(row, column, block.head);
      v[j] = reinterpret_cast<const C*>(cache.v.data) + cache.v.at(row, column, block.head);
    }
  }
};

// The sums of one head of one key and R rows of queries, lane by lane.
template <class A, int R, class C>
LV_INLINE void score_unit(const typename A::Unpacked* q, const C* k, float* products) {
  typename A::Sum acc[R] = {};
#pragma GCC unroll 8
  for (int64_t d = 0; d < kStreamDim; d += A::kColumns) {
    const typename A::Operand x = A::operand(k + d);
#pragma GCC unroll 5
    for (int r = 0; r < R; ++r) acc[r] = A::mac(acc[r], A::operand(q + r * kStreamDim + d), x);
  }
#pragma GCC unroll 5
  for (int r = 0; r < R; ++r) std::memcpy(products + r * W, &acc[r], sizeof acc[r]);
}

// Further than that and less far (6 to 16 KiB) is no better or worse. Where a cache ends or goes on elsewhere the request is wasted, no more.
constexpr int64_t kAheadBytes = 12288;
template <class C>
LV_INLINE void ask_ahead(const C* row) {
#pragma GCC unroll 8
  for (int64_t at = 0; at < kStreamDim * int64_t(sizeof(C)); at += 64) {
    __builtin_prefetch(reinterpret_cast<const char*>(row) + kAheadBytes + at, 0, 2);
  }
}

// Weighted sums of the tile `now` (or null) into own.sums, while scores are made of the tile `next` (or null).
template <class A, int R, bool kNow, bool kNext, class C>
void stream_tile(const TileRows<C>* now, const TileRows<C>* next, int64_t heads, int64_t k_head, int64_t v_head,
                 const typename A::Unpacked* q, const Scratch& own, StreamScratch& s) {
  const int64_t slots = (heads * R + W - 1) / W * W;
  int64_t token = 0, head = 0;      // of the next tile
  const C *k = kNext ? next->k[0] : nullptr, *values = kNext ? next->v[0] : nullptr;
  float* scores = s.scores;
  for (int64_t h = 0; h < heads; ++h) {
    const C* v[kKeys];
    if constexpr (kNow) for (int j = 0; j < kKeys; ++j) v[j] = now->v[j] + h * v_head;
    for (int64_t column = 0; column < kStreamDim; column += kTogether * W) {
      typename A::Sum acc[R][kTogether] = {};
      int folded = 0;      // of R · W products
#pragma GCC unroll 1
      for (int j = 0; j < W; ++j) {
        if constexpr (kNow) {
          typename A::Operand x[kTogether];
          load_columns<A, kTogether>(v, j, column, x);
#pragma GCC unroll 5
          for (int r = 0; r < R; ++r) {
            const typename A::Operand weight = A::spread(s.weights + j * slots + h * R + r);
#pragma GCC unroll 4
            for (int c = 0; c < kTogether; ++c) acc[r][c] = A::mac(acc[r][c], weight, x[c]);
          }
        }
        if constexpr (kNext) {
          score_unit<A, R>(q + head * R * kStreamDim, k, s.products + j * R * W);
          ask_ahead(k);
          ask_ahead(values);
          k += k_head, values += v_head;
          if ((j + 1) * R >= (folded + 1) * W) {
            store(scores, A::to_float(fold_sums<typename A::Sum>(s.products + folded * W * W)));
            scores += W, ++folded;
          }
          if (++head == heads) {
            head = 0, ++token;
            if (token < kKeys) k = next->k[token], values = next->v[token];
          }
        }
      }
      if constexpr (kNow) {
#pragma GCC unroll 5
        for (int r = 0; r < R; ++r) {
          const int64_t row = h * R + r;
#pragma GCC unroll 4
          for (int c = 0; c < kTogether; ++c) {
            float* at = own.sums + row * kStreamDim + column + c * W;
            store(at, fma(A::to_float(acc[r][c]), splat(own.gain[row]), load(at) * own.keep[row]));
          }
        }
      }
    }
  }
}

// Scores → weights relative to the maximum of their own tile, and the factors that join the tile to those before it, as `soften`.
template <class A, int R, class C>
void soften_slots(const DecodeArgs& args, const Block& block, const TileRows<C>& tile, int64_t first, const Keys* seen, const Scratch& own,
                  StreamScratch& s) {
  const int64_t count = block.heads * R, slots = (count + W - 1) / W * W;
  const bool scaled = args.cache.k.scale != nullptr;
  bool whole = tile.keys == kKeys;
  for (int r = 0; r < R; ++r) whole = whole && seen[r].first <= first && seen[r].last >= first + kKeys;
  if (scaled) {
    for (int j = 0; j < kKeys; ++j) {
      const int64_t at = first + std::min(j, tile.keys - 1), row = args.cache.row(block.sequence, at), column = args.cache.column(at);
      for (int64_t h = 0; h < block.heads; ++h) {
        s.k_factors[j * W + h] = args.cache.k.scale_at(row, column, block.head + h);
        s.v_factors[j * W + h] = j < tile.keys ? args.cache.v.scale_at(row, column, block.head + h) : 0.0f;
      }
    }
  }
  for (int64_t v = 0; v < slots; v += W) {
    vi head = {}, from = {}, to = {};
    for (int i = 0; i < W; ++i) {
      const int64_t slot = std::min(v + i, count - 1), r = slot % R;
      head[i] = int32_t(slot / R);
      if (!whole) from[i] = int32_t(std::clamp<int64_t>(seen[r].first - first, 0, tile.keys)),
                  to[i] = int32_t(std::clamp<int64_t>(seen[r].last - first, 0, tile.keys));
    }
    const vf step = load(own.q_step + v);
    vf top = splat(-kInf);
    for (int j = 0; j < kKeys; ++j) {
      vf x = load(s.scores + j * count + v) * step;
      if (scaled) x *= __builtin_shuffle(load(s.k_factors + j * W), head);
      if (args.softcap > 0.0f) x = vtanh(x * (1.0f / args.softcap)) * args.softcap;
      x *= kLog2e;
      if (!whole) x = select((from <= j) & (to > j), x, splat(-kInf));
      top = vmax(x, top);
      store(s.shaped + j * slots + v, x);
    }
    const vf before = load(own.maximum + v), larger = vmax(top, before), base = larger == splat(-kInf) ? vf{} : larger;
    const vf local = top == splat(-kInf) ? vf{} : top, keep = vexp2(before - base), gain = vexp2(top - base);
    vf factor = splat(1.0f), v_step = splat(1.0f);
    if constexpr (std::is_same_v<A, Words>) {      // scales relative to the largest of the tile: words use all their bits
      vf largest = {};
      for (int j = 0; j < kKeys; ++j) largest = vmax(vabs(load(s.v_factors + j * W)), largest);
      largest = __builtin_shuffle(largest, head);
      factor = select(largest > 0.0f, kLargestWord / largest, vf{}), v_step = largest * (1.0f / kLargestWord);
    }
    vf total = {};
    for (int j = 0; j < W; ++j) {
      vf weight[2];
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        weight[i] = vexp2(load(s.shaped + (j + i * W) * slots + v) - local);
        total += weight[i];
        if (scaled) weight[i] *= __builtin_shuffle(load(s.v_factors + (j + i * W) * W), head) * factor;
      }
      const vu pairs = A::weights(weight[0], weight[1]);
      std::memcpy(s.weights + j * slots + v, &pairs, sizeof pairs);
    }
    store(own.total + v, fma(total, gain, load(own.total + v) * keep));
    store(own.maximum + v, larger);
    store(own.keep + v, keep);
    store(own.gain + v, gain * v_step);
  }
}

template <class A, int R, class C>
void stream_rows(const DecodeArgs& args, const Block& block, int64_t start, int64_t end, const Keys* seen, const Scratch& own,
                 StreamScratch& s) {
  const int64_t heads = block.heads, k_head = args.cache.k.stride_head, v_head = args.cache.v.stride_head;
  const auto* q = reinterpret_cast<const typename A::Unpacked*>(own.q);
  TileRows<C> tiles[2] = {{args.cache, block, start, end}, {args.cache, block, start, end}};
  stream_tile<A, R, false, true, C>(nullptr, &tiles[0], heads, k_head, v_head, q, own, s);
  int now = 0;
  for (int64_t key = start; key < end; key += kKeys, now = 1 - now) {
    soften_slots<A, R>(args, block, tiles[now], key, seen, own, s);
    if (key + kKeys >= end) return stream_tile<A, R, true, false, C>(&tiles[now], nullptr, heads, k_head, v_head, q, own, s);
    tiles[1 - now] = {args.cache, block, key + kKeys, end};
    stream_tile<A, R, true, true, C>(&tiles[now], &tiles[1 - now], heads, k_head, v_head, q, own, s);
  }
}

// Whether `stream` takes the block.
inline bool streams(const DecodeArgs& args, const Block& block) {
  return args.q.dim == kStreamDim && block.rows <= kStreamRows && block.heads <= kStreamHeads;
}

// Keys start … end of a block, added to own.sums and its softmax.
template <class A, class C>
void stream(const DecodeArgs& args, const Block& block, int64_t start, int64_t end, const Keys* seen, const Scratch& own) {
  StreamScratch& s = *reinterpret_cast<StreamScratch*>(own.stream);
  switch (block.rows) {
    case 1: return stream_rows<A, 1, C>(args, block, start, end, seen, own, s);
    case 2: return stream_rows<A, 2, C>(args, block, start, end, seen, own, s);
    case 3: return stream_rows<A, 3, C>(args, block, start, end, seen, own, s);
    case 4: return stream_rows<A, 4, C>(args, block, start, end, seen, own, s);
    default: return stream_rows<A, 5, C>(args, block, start, end, seen, own, s);
  }
}

}  // namespace
}  // namespace longvita::LV_ISA
