// Packed attention: the problem as the binding hands it over, the tasks it is cut into, the kernels' entry points.
#pragma once
#include <algorithm>
#include <cstdint>

#include "longvita/dtype.h"
#include "longvita/isa.h"
#include "longvita/views.h"

namespace longvita {

struct AttentionProblem {
  DType dtype = DType::f32;
  DType result = DType::f32;            // of out and of the gradients: dtype, or f32 for parts that are added up later
  Rows3 q, k, v;
  const int32_t* cu_q = nullptr;        // docs + 1 offsets
  const int32_t* cu_k = nullptr;
  int64_t docs = 0;
  double scale = 1.0, softcap = 0.0;
  int64_t left = -1, right = -1;        // window, -1: open
  int threads = 1;

  int64_t dim() const { return q.dim; }
  int64_t kv_heads() const { return k.heads; }
  int64_t group() const { return q.heads / k.heads; }
};

// How the active instruction set cuts one direction of the problem. Query rows: (position, head of the group), position-major.
struct AttentionTiles {
  int64_t query_rows;          // rows of one query block
  int64_t scratch;             // floats per thread
};

// Length of the pieces, about `target` each, that `keys` are cut into: all alike but the last, so that none is left with a handful.
inline int64_t even_piece(int64_t keys, int64_t target) {
  const int64_t pieces = std::max<int64_t>(1, (keys + target / 2) / target);
  return std::max<int64_t>(16, (keys + pieces * 16 - 1) / (pieces * 16) * 16);
}

// Keys of one backward task: long enough that loading the query blocks anew for each partition costs little, at least four to a long
// document. It follows from the document alone, as the sums in dq do.
inline int64_t partition_of(int64_t keys) { return even_piece(keys, std::clamp<int64_t>(keys / 4, 512, 1024)); }

// Piece `piece` (forward: query block, backward: key partition) of every unit in [unit0, unit1); unit = document * kv_heads + KV head.
struct AttentionTask {
  int64_t unit0, unit1, piece;
  int64_t progress;            // backward, several partitions: where this unit's counters begin, one per query block
  int64_t cost;
};

struct AttentionForward {
  AttentionProblem p;
  Rows3 out;                     // dense
  float* lse = nullptr;          // (Hq, Tq) dense
  float* lse_rest = nullptr;     // likewise: what rounding took from lse
  const AttentionTask* tasks = nullptr;
  int64_t n_tasks = 0;
  float* scratch = nullptr;      // threads * tiles.scratch
  int64_t scratch_per_thread = 0;
};

struct AttentionBackward {
  AttentionProblem p;
  Rows3 out, grad_out;
  const float* lse = nullptr;
  const float* lse_rest = nullptr;          // strides as lse
  const float* grad_lse = nullptr;          // may be null: zeros
  int64_t lse_stride_head = 0, lse_stride_token = 0, grad_lse_stride_head = 0, grad_lse_stride_token = 0;
  char *grad_q = nullptr, *grad_k = nullptr, *grad_v = nullptr;      // dense; null: not wanted
  float* partial = nullptr;                 // (Tq, Hq, D): sums for grad_q of documents with several partitions; fp32 grad_q itself holds them
  int32_t* progress = nullptr;              // zeros
  const AttentionTask* tasks = nullptr;
  int64_t n_tasks = 0;
  float* scratch = nullptr;
  int64_t scratch_per_thread = 0;
};

struct AttentionKernels {
  AttentionTiles (*tiles)(const AttentionProblem&, bool backward);
  void (*forward)(const AttentionForward&);
  void (*backward)(const AttentionBackward&);
};

}  // namespace longvita
LV_DECLARE_KERNELS(AttentionKernels, attention_kernels)
