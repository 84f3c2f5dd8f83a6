// The Python functions of merge_attention, for a device: `Where` is the number of threads on a CPU, the stream on a GPU.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "longvita/merge_attention.h"

namespace longvita {

template <class Where>
void define_merge_attention(pybind11::module_& m, void (*forward)(const MergeArgs&, Where), void (*backward)(const MergeArgs&, Where)) {
  using Sizes = std::array<int64_t, 3>;
  using Strides = std::array<int64_t, 2>;
  m.def("merge_attention_forward",
        [forward](int dtype, Sizes size, uintptr_t out_a, Strides out_a_stride, uintptr_t lse_a, Strides lse_a_stride, uintptr_t out_b,
                  Strides out_b_stride, uintptr_t lse_b, Strides lse_b_stride, uintptr_t out, uintptr_t merged_lse, Where where) {
          MergeArgs args = merge_inputs(dtype, size, {out_a, out_a_stride}, {lse_a, lse_a_stride}, {out_b, out_b_stride}, {lse_b, lse_b_stride});
          if (args.tokens == 0) return;
          check(out != 0 && merged_lse != 0, "merge_attention: output is null");
          args.out = merge_dense(args, out, "out");
          args.lse = merge_lse(args, {merged_lse, {args.tokens, 1}}, "lse");
          pybind11::gil_scoped_release release;
          forward(args, where);
        });
  m.def("merge_attention_backward",
        [backward](int dtype, Sizes size, uintptr_t out_a, Strides out_a_stride, uintptr_t lse_a, Strides lse_a_stride, uintptr_t out_b,
                   Strides out_b_stride, uintptr_t lse_b, Strides lse_b_stride, uintptr_t grad_out, Strides grad_out_stride,
                   uintptr_t grad_lse, Strides grad_lse_stride, std::array<uintptr_t, 4> grads, Where where) {
          MergeArgs args = merge_inputs(dtype, size, {out_a, out_a_stride}, {lse_a, lse_a_stride}, {out_b, out_b_stride}, {lse_b, lse_b_stride});
          if (args.tokens == 0) return;
          if (grad_out != 0) args.out = merge_rows(args, {grad_out, grad_out_stride}, "grad_out");
          args.lse = merge_lse(args, {grad_lse, grad_lse_stride}, "grad_lse");
          args.grad_out_a = merge_dense(args, grads[0], "grad_out_a");
          args.grad_lse_a = merge_lse(args, {grads[1], {args.tokens, 1}}, "grad_lse_a");
          args.grad_out_b = merge_dense(args, grads[2], "grad_out_b");
          args.grad_lse_b = merge_lse(args, {grads[3], {args.tokens, 1}}, "grad_lse_b");
          pybind11::gil_scoped_release release;
          backward(args, where);
        });
}

}  // namespace longvita
