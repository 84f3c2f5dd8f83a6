// How a call of decode_attention is cut, and where a thread keeps what it works with.
//
// Queries of one key/value head are flattened to rows (query, head of its group) and cut into blocks of up to kRows; the keys that a block
// can see are cut into `splits` ranges. Each (block, range) is one piece of work that gives unnormalised sums, later combined in order.
// How it is cut depends on the sequence alone: not on the threads, not on the rest of the batch.
//
// A block takes several key/value heads side by side, all of them over a long cache: a token's heads are neighbours in memory, and reading
// them together is what turns jumps of heads · dim into one stream. (Head by head took 1.2 to 1.5 times as long on 131,072 keys.)
#pragma once
#include <algorithm>
#include <utility>
#include <vector>

#include "decode_attention.h"
#include "simd.h"

namespace longvita::LV_ISA {
namespace {

constexpr int kRows = 32, kKeys = 32;              // queries of a head, keys of a tile
constexpr int64_t kStreamDim = 128, kStreamRows = 5, kStreamHeads = 16;      // head dimension, rows a head, heads: see decode_stream.h
constexpr int64_t kStreamSlots = (kStreamHeads * kStreamRows + W - 1) / W * W;

// What decode_stream.h keeps between steps, a thread: about 40 KiB.
struct alignas(64) StreamScratch {
  float products[W * kStreamRows * W];      // sums of scores of W heads of keys, not yet taken across lanes
  float scores[kKeys * kStreamHeads * kStreamRows + W];      // (keys, slots), dense
  float shaped[kKeys * kStreamSlots];      // (keys, slots), in units of log2, masked
  float weights[W * kStreamSlots];         // (keys, slots) of key j and j + W as operands
  float k_factors[kKeys * W], v_factors[kKeys * W];      // (keys, heads)
};
constexpr int64_t kStreamFloats = sizeof(StreamScratch) / 4;

constexpr int64_t kSplit = 512, kMaxPieces = 64;   // keys per range at least; pieces per sequence about at most
constexpr int64_t kTogetherKeys = 8192;            // from so many keys on, all heads make one block

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

// Where a thread keeps what it works with, in floats from `memory`.
struct Scratch {
  float *q, *sums, *scores, *maximum, *total, *keep, *gain, *q_step, *v_step, *k_factors, *v_factors, *k_rows, *v_rows, *stream, *end;

  Scratch(float* memory, int64_t dim, int64_t heads) : end(memory) {
    const int64_t width = padded(dim), rows = heads * kRows;
    for (float** part : {&q, &sums}) *part = take(rows * width);
    scores = take(rows * kKeys);
    for (float** part : {&maximum, &total, &keep, &gain, &q_step, &v_step}) *part = take((rows + W - 1) / W * W);
    for (float** part : {&k_factors, &v_factors}) *part = take(heads * kKeys);
    for (float** part : {&k_rows, &v_rows}) *part = take((kKeys + 1) * width);      // and a row of zeros
    stream = take(dim == kStreamDim ? kStreamFloats : 0);
  }

 private:
  float* take(int64_t floats) {
    float* const at = end;
    end += floats;
    return at;
  }
};
int64_t thread_floats(int64_t dim, int64_t heads) {
  float* const anywhere = reinterpret_cast<float*>(64);      // only the distance counts
  return Scratch(anywhere, dim, heads).end - anywhere;
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

}  // namespace
}  // namespace longvita::LV_ISA
