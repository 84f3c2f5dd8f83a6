#include "../bind_merge_attention.h"

#include "merge_attention.h"

void bind_merge_attention(pybind11::module_& m) {
  using namespace longvita;
  define_merge_attention<uintptr_t>(
      m, [](const MergeArgs& args, uintptr_t stream) { cuda::merge_attention_forward(args, reinterpret_cast<cudaStream_t>(stream)); },
      [](const MergeArgs& args, uintptr_t stream) { cuda::merge_attention_backward(args, reinterpret_cast<cudaStream_t>(stream)); });
}
