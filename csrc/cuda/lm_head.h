// Logits of a few rows on a GPU; see longvita_kernels/ops/masked_lm_head.py.
#pragma once
#include <cuda_runtime_api.h>

#include "longvita/views.h"

namespace longvita::cuda {

struct FewRowsArgs {
  DType dtype = DType::f32;
  int64_t tokens = 0, width = 0, vocab = 0, rows = 0;
  const char* hidden = nullptr;      // (tokens, width)
  int64_t hidden_stride = 0;         // elements
  const char* weight = nullptr;      // (vocab, width)
  int64_t weight_stride = 0;
  const int64_t* index = nullptr;    // (rows,): rows of hidden, clamped to those that there are
  char* out = nullptr;               // (rows, vocab), dense
};

// What one pass over the weight takes, and how it is launched.
struct FewRowsPlan {
  int rows = 0;             // of hidden, at most kFewRows; 0: not even one fits into shared memory
  int64_t row_bytes = 0;    // of a row of hidden in shared memory
  int64_t blocks = 0;
};

constexpr int kFewRows = 8;

FewRowsPlan plan_few_rows(DType dtype, int64_t rows, int64_t width, int64_t vocab, int64_t shared_limit, int64_t multiprocessors);
void masked_lm_head_few_rows(const FewRowsArgs& args, cudaStream_t stream);

}  // namespace longvita::cuda
