#include "bind_merge_attention.h"

#include "merge_attention.h"

void bind_merge_attention(pybind11::module_& m) {
  using namespace longvita;
  define_merge_attention<int>(
      m,
      [](const MergeArgs& args, int threads) {
        check(threads > 0, "merge_attention: threads must be positive");
        merge_kernels().forward(args, threads);
      },
      [](const MergeArgs& args, int threads) {
        check(threads > 0, "merge_attention: threads must be positive");
        merge_kernels().backward(args, threads);
      });
}
