// Logits of selected rows: out[m] = hidden[index[m]] · weightᵀ, and its gradients. Row-major, last dimension dense, strides in elements.
#pragma once
#include <cstdint>

#include "longvita/dtype.h"
#include "longvita/isa.h"

namespace longvita {

struct LmHeadArgs {
  DType dtype;
  int64_t tokens, width, vocab, rows;                 // T, H, V, M
  const void* hidden; int64_t hidden_stride;          // (T, H)
  const void* weight; int64_t weight_stride;          // (V, H)
  const int64_t* index;                               // (M)
  float* scratch;                                     // threads × gemm_scratch_floats
  int threads;
  // forward
  void* out;                                          // (M, V)
  float* gathered;                                    // (4, H rounded up to 16)
  // backward
  const void* grad; int64_t grad_stride;              // (M, V)
  void* grad_hidden;                                  // (T, H), zeros; or null: not needed
  float* grad_rows;                                   // (M, H), behind grad_hidden
  int64_t* owner;                                     // (T), behind grad_hidden
  void* grad_weight;                                  // (V, H), or null
};

struct LmHeadKernels {
  int64_t scratch_floats;                             // of the matrix product, per thread
  int64_t thin_rows;                                  // up to this many rows forward needs none
  void (*forward)(const LmHeadArgs&);
  void (*backward)(const LmHeadArgs&);
};

}  // namespace longvita
LV_DECLARE_KERNELS(LmHeadKernels, lm_head_kernels)
