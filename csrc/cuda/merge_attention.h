// Exact combination of two partial attentions on a GPU; arguments: longvita/merge_attention.h.
#pragma once
#include <cuda_runtime_api.h>

#include "longvita/merge_attention.h"

namespace longvita::cuda {

void merge_attention_forward(const MergeArgs& args, cudaStream_t stream);
void merge_attention_backward(const MergeArgs& args, cudaStream_t stream);

}  // namespace longvita::cuda
