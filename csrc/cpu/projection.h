// Pixel shuffle + LayerNorm + Linear + exact GELU + Linear, forward and backward. Row-major, last dimension dense, strides in elements.
//
// One output row (a token) is 2 × 2 patches of x side by side. They are read where they stand, as runs, and normalised on the way into
// the matrix product: neither the shuffled nor the normalised matrix exists.
#pragma once
#include <cstdint>

#include "longvita/dtype.h"
#include "longvita/isa.h"

namespace longvita {

struct ProjectionArgs {
  DType dtype;
  int64_t tiles, grid_rows, grid_cols, channels;      // N, patches per column and row of a tile (even), C
  int64_t hidden, out;                                // widths of the two linear layers
  const void* x; int64_t x_tile, x_patch;             // first patch (class token skipped); strides of tiles and patches
  const float* ln_weight; const float* ln_bias;       // (4C)
  const void* w1; int64_t w1_stride;                  // (hidden, 4C)
  const void* w2; int64_t w2_stride;                  // (out, hidden)
  const float* b1; const float* b2;                   // (hidden), (out), or null
  float eps;
  float* stats;                                       // (2, R): mean and 1/std of every token; R = N · rows/2 · cols/2
  void* z;                                            // (R, hidden) before GELU, in dtype; null in a forward pass that is not differentiated
  void* act;                                          // (R, hidden) after GELU, in dtype, 64-byte aligned, rows act_stride(hidden, dtype)
                                                      // apart; backward puts the gradient of z into its place
  float* scratch;                                     // threads × gemm_scratch_floats
  float* row_scratch;                                 // threads × 2 × 4C
  int threads;
  void* y;                                            // (R, out)

  // Backward. Null pointers: not needed.
  const void* grad; int64_t grad_stride;              // (R, out)
  bool needs_first;                                   // x, LayerNorm, w1 or b1 takes a gradient
  bool needs_x;
  float* partial;                                     // (blocks of R, 2, 4C)
  void* grad_x; int64_t grad_x_tile, grad_x_patch;    // first patch; room that is needed for LayerNorm's gradients too
  float* grad_ln_weight; float* grad_ln_bias;         // (4C), both or none
  void* grad_w1; void* grad_w2;
  float* grad_b1; float* grad_b2;
};

struct ProjectionKernels {
  int64_t block_rows;                                 // tokens behind one row of partial
  int64_t (*act_stride)(int64_t hidden, DType dtype);
  void (*forward)(const ProjectionArgs&);
  void (*backward)(const ProjectionArgs&);
};

}  // namespace longvita
LV_DECLARE_KERNELS(ProjectionKernels, projection_kernels)
