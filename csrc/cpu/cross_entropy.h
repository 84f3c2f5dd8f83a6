// Cross entropy of logits = hidden · weightᵀ for rows picked by an index, without the logits: only a part of them exists at a time.
//
// Three ways to the gradients. At once with the loss: some rows, all columns; the softmax of a row needs its whole sum, so the gradient of
// weight grows from part to part in fp32. Keep, then finish: the loss leaves the gradients of all rows' logits, which for few rows are smaller
// than that fp32 gradient, and the other two products wait for backward. Or recompute, once the statistics are known: all rows, some columns;
// the gradient of weight is then finished part by part and never held in fp32, at the price of a fourth product.
//
//   l[m, v] = softcap(hidden[index[m]] · weight[v])       softcap(x) = cap · tanh(x / cap), or x where cap is 0
//   max[m] = max_v l[m, v]          exp_sum[m] = Σ_v exp(l[m, v] - max[m])        lse[m] = max[m] + log exp_sum[m]
//   target[m] = l[m, label[m]]      sum[m] = Σ_v l[m, v]
//   d l[m, v] = a[m] · exp(l[m, v] - max[m]) / exp_sum[m] + b[m] · [v = label[m]] + c[m]
//
// a, b, c are the gradients of lse, target and sum: every loss (smoothing, z-loss, weights) is a choice of them. (exp(l - lse) would be
// the same, but lse is rounded: half a unit in its last place is 2e-7 of every probability of the row.)
#pragma once
#include <cstdint>

#include "longvita/dtype.h"
#include "longvita/isa.h"

namespace longvita {

enum class GradientWay { at_once, keep, finish, recompute };

struct CrossEntropyArgs {
  DType dtype;
  int64_t width, vocab, rows;                         // H, V, M
  const void* hidden; int64_t hidden_stride;          // (T, H)
  const void* weight; int64_t weight_stride;          // (V, H)
  const int64_t* index;                               // (M) rows of hidden
  const int64_t* labels;                              // (M); a label outside 0 … V-1 belongs to another part of the vocabulary
  float softcap;
  float* statistics;                                  // (5, M): lse, target, sum, max, exp_sum; read by recompute, not needed by finish
  int64_t chunk;                                      // rows at a time, all of them to keep and to finish; columns at a time to recompute
  float* partial;                                     // (3, blocks of kTileN in V, chunk), for the loss: at_once and keep
  float* scratch;                                     // threads × gemm_scratch_floats
  int threads;

  // Gradients, where logits is not null.
  GradientWay way;                                    // recompute: statistics and coefficients are given; else the loss is known to be
                                                      // weight·((1-smoothing)(lse-target) + smoothing(lse-sum/V) + z_loss·lse²), summed
  float* coefficients;                                // (3, M): a, b, c; read by recompute, written by at_once and keep
  const float* row_weight;                            // (M) or null: 1
  float smoothing, z_loss;
  void* logits;                                       // (chunk, V), or (M, chunk) to recompute; bf16 or float32: see below
  float factor;                                       // of both gradients, to finish; else 1
  void* grad_hidden;                                  // (M, H) fp32, or (T, H) in dtype to finish; or null
  void* grad_weight;                                  // (V, H) or null: fp32, or dtype to finish and to recompute
};

struct CrossEntropyKernels {
  int64_t block;                                      // columns of the vocabulary behind one entry of partial
  bool (*keeps_bf16)(DType dtype, float softcap, bool recompute);      // what logits are kept as between the products
  void (*run)(const CrossEntropyArgs&);
  // out = values · factor, rounded once: the gradients of the loss into those of whatever it is part of (the way at_once).
  void (*scale)(const float* values, int64_t count, float factor, DType dtype, void* out, int threads);
};

}  // namespace longvita
LV_DECLARE_KERNELS(CrossEntropyKernels, cross_entropy_kernels)
