#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "merge_attention.h"

namespace py = pybind11;
using namespace longvita;

namespace {

using Sizes = std::array<int64_t, 3>;
using Strides = std::array<int64_t, 2>;

Lse lse(uintptr_t address, const Sizes& size, const Strides& stride, const char* name) {
  check(stride[0] >= 0 && stride[1] >= 0, name, ": strides must not be negative");
  return {pointer<float>(address, address == 0 ? 0 : size[0] * size[1], name), stride[0], stride[1]};
}

MergeArgs inputs(int dtype, const Sizes& size, uintptr_t out_a, Strides out_a_stride, uintptr_t lse_a, Strides lse_a_stride,
                 uintptr_t out_b, Strides out_b_stride, uintptr_t lse_b, Strides lse_b_stride, int threads) {
  MergeArgs args;
  args.dtype = DType(dtype);
  check(dtype >= 0 && dtype <= 2, "merge_attention: expected float32, bfloat16 or float16");
  check(threads > 0, "merge_attention: threads must be positive");
  args.tokens = size[0], args.heads = size[1], args.dim = size[2], args.threads = threads;
  args.out_a = rows3(out_a, args.dtype, size[0], size[1], size[2], out_a_stride[0], out_a_stride[1], "out_a");
  args.out_b = rows3(out_b, args.dtype, size[0], size[1], size[2], out_b_stride[0], out_b_stride[1], "out_b");
  check((lse_a != 0 && lse_b != 0) || size[0] * size[1] == 0, "merge_attention: lse is null");
  args.lse_a = lse(lse_a, size, lse_a_stride, "lse_a");
  args.lse_b = lse(lse_b, size, lse_b_stride, "lse_b");
  return args;
}

// A dense (tokens, heads, dim) tensor, or nothing.
Rows3 dense(uintptr_t address, const MergeArgs& args, const char* name) {
  if (address == 0) return {};
  return rows3(address, args.dtype, args.tokens, args.heads, args.dim, args.heads * args.dim, args.dim, name);
}

}  // namespace

void bind_merge_attention(py::module_& m) {
  m.def("merge_attention_forward",
        [](int dtype, Sizes size, uintptr_t out_a, Strides out_a_stride, uintptr_t lse_a, Strides lse_a_stride, uintptr_t out_b,
           Strides out_b_stride, uintptr_t lse_b, Strides lse_b_stride, uintptr_t out, uintptr_t merged_lse, int threads) {
          MergeArgs args = inputs(dtype, size, out_a, out_a_stride, lse_a, lse_a_stride, out_b, out_b_stride, lse_b, lse_b_stride, threads);
          if (args.tokens == 0) return;
          check(out != 0 && merged_lse != 0, "merge_attention: output is null");
          args.out = dense(out, args, "out");
          args.lse = lse(merged_lse, size, {args.tokens, 1}, "lse");
          py::gil_scoped_release release;
          merge_kernels().forward(args);
        });
  m.def("merge_attention_backward",
        [](int dtype, Sizes size, uintptr_t out_a, Strides out_a_stride, uintptr_t lse_a, Strides lse_a_stride, uintptr_t out_b,
           Strides out_b_stride, uintptr_t lse_b, Strides lse_b_stride, uintptr_t grad_out, Strides grad_out_stride, uintptr_t grad_lse,
           Strides grad_lse_stride, std::array<uintptr_t, 4> grads, int threads) {
          MergeArgs args = inputs(dtype, size, out_a, out_a_stride, lse_a, lse_a_stride, out_b, out_b_stride, lse_b, lse_b_stride, threads);
          if (args.tokens == 0) return;
          if (grad_out != 0) {
            args.out = rows3(grad_out, args.dtype, size[0], size[1], size[2], grad_out_stride[0], grad_out_stride[1], "grad_out");
          }
          args.lse = lse(grad_lse, size, grad_lse_stride, "grad_lse");
          args.grad_out_a = dense(grads[0], args, "grad_out_a");
          args.grad_lse_a = lse(grads[1], size, {args.tokens, 1}, "grad_lse_a");
          args.grad_out_b = dense(grads[2], args, "grad_out_b");
          args.grad_lse_b = lse(grads[3], size, {args.tokens, 1}, "grad_lse_b");
          py::gil_scoped_release release;
          merge_kernels().backward(args);
        });
}
