#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "lm_head.h"
#include "longvita/views.h"
#include "projection.h"

namespace py = pybind11;
using namespace longvita;

namespace {

using Pair = std::array<int64_t, 2>;
using Sizes = std::array<int64_t, 6>;      // N, rows and columns of the grid, C, D, O

// What a call needs beside inputs and outputs, one part behind the other, in floats: two tokens and the matrix product's scratch per
// thread, the activations, the statistics where nobody keeps them.
struct Workspace {
  int64_t tokens, width, scratch, act, stats, end;
};
Workspace workspace_of(DType dtype, const Sizes& sizes, int threads) {
  for (int64_t size : sizes) check(size >= 0, "pixel_shuffle_projection: sizes must not be negative");
  check(sizes[1] > 0 && sizes[2] > 0 && sizes[1] % 2 == 0 && sizes[2] % 2 == 0, "pixel_shuffle_projection: the grid must be even");
  check(sizes[3] > 0, "pixel_shuffle_projection: no channels");
  check(threads > 0, "pixel_shuffle_projection: needs at least one thread");
  const auto line = [](int64_t floats) { return (floats + 15) / 16 * 16; };      // every part begins at a cache line
  Workspace w = {};
  w.tokens = sizes[0] * (sizes[1] / 2) * (sizes[2] / 2), w.width = 4 * sizes[3];
  w.scratch = line(threads * 2 * w.width);
  w.act = w.scratch + line(threads * lm_head_kernels().scratch_floats);
  w.stats = w.act + line(w.tokens * projection_kernels().act_stride(sizes[4], dtype) * int64_t(dtype_size(dtype)) / 4);
  w.end = w.stats + 2 * w.tokens;
  return w;
}
DType checked(int dtype) {
  check(dtype >= 0 && dtype <= 2, "pixel_shuffle_projection: dtype must be float32, bfloat16 or float16");
  return DType(dtype);
}

// The arguments that forward and backward share, in this order. stats: (2, tokens), or 0: in the workspace.
#define LV_PROJECTION_ARGUMENTS                                                                                                          \
  int dtype, const Sizes &sizes, uintptr_t x, Pair x_strides, uintptr_t ln_weight, uintptr_t ln_bias, uintptr_t w1, int64_t w1_stride,     \
      uintptr_t b1, uintptr_t w2, int64_t w2_stride, uintptr_t b2, float eps, uintptr_t stats, uintptr_t z, uintptr_t workspace, int threads

ProjectionArgs arguments(LV_PROJECTION_ARGUMENTS) {
  ProjectionArgs p = {};
  p.dtype = checked(dtype);
  const Workspace room = workspace_of(p.dtype, sizes, threads);
  float* at = pointer<float>(workspace, room.end, "workspace");
  p.tiles = sizes[0], p.grid_rows = sizes[1], p.grid_cols = sizes[2], p.channels = sizes[3], p.hidden = sizes[4], p.out = sizes[5];
  p.x = pointer<const char>(x, room.tokens * room.width, "x"), p.x_tile = x_strides[0], p.x_patch = x_strides[1];
  p.ln_weight = pointer<const float>(ln_weight, room.width, "ln_weight"), p.ln_bias = pointer<const float>(ln_bias, room.width, "ln_bias");
  p.w1 = pointer<const char>(w1, p.hidden * room.width, "w1"), p.w1_stride = w1_stride;
  p.w2 = pointer<const char>(w2, p.out * p.hidden, "w2"), p.w2_stride = w2_stride;
  p.b1 = reinterpret_cast<const float*>(b1), p.b2 = reinterpret_cast<const float*>(b2);
  p.eps = eps;
  p.stats = stats == 0 ? at + room.stats : reinterpret_cast<float*>(stats);
  p.z = reinterpret_cast<void*>(z);
  p.row_scratch = at, p.scratch = at + room.scratch, p.act = at + room.act;
  p.threads = threads;
  return p;
}

#define LV_PROJECTION_PASS \
  dtype, sizes, x, x_strides, ln_weight, ln_bias, w1, w1_stride, b1, w2, w2_stride, b2, eps, stats, z, workspace, threads

void forward(LV_PROJECTION_ARGUMENTS, uintptr_t y) {
  ProjectionArgs p = arguments(LV_PROJECTION_PASS);
  const int64_t tokens = p.tiles * (p.grid_rows / 2) * (p.grid_cols / 2);
  p.y = pointer<char>(y, tokens * p.out, "y");
  py::gil_scoped_release release;
  projection_kernels().forward(p);
}

// grads: addresses of the gradients of x (first patch), ln_weight, ln_bias, w1, b1, w2, b2; 0 where not needed. The first is room that
// LayerNorm's gradients need as well; needs_x: it is wanted.
void backward(LV_PROJECTION_ARGUMENTS, uintptr_t grad, int64_t grad_stride, bool needs_x, uintptr_t partial, Pair grad_x_strides,
              std::array<uintptr_t, 7> grads) {
  ProjectionArgs p = arguments(LV_PROJECTION_PASS);
  const int64_t tokens = p.tiles * (p.grid_rows / 2) * (p.grid_cols / 2);
  p.grad = pointer<const char>(grad, tokens * p.out, "grad"), p.grad_stride = grad_stride;
  p.needs_x = needs_x;
  p.needs_first = grads[0] != 0 || grads[1] != 0 || grads[3] != 0 || grads[4] != 0;
  p.partial = reinterpret_cast<float*>(partial);
  p.grad_x = reinterpret_cast<void*>(grads[0]), p.grad_x_tile = grad_x_strides[0], p.grad_x_patch = grad_x_strides[1];
  p.grad_ln_weight = reinterpret_cast<float*>(grads[1]), p.grad_ln_bias = reinterpret_cast<float*>(grads[2]);
  p.grad_w1 = reinterpret_cast<void*>(grads[3]), p.grad_b1 = reinterpret_cast<float*>(grads[4]);
  p.grad_w2 = reinterpret_cast<void*>(grads[5]), p.grad_b2 = reinterpret_cast<float*>(grads[6]);
  check(tokens * p.hidden == 0 || (z != 0 && stats != 0), "pixel_shuffle_projection: backward needs the statistics and the values before GELU");
  check(grads[0] != 0 || tokens == 0 || (!needs_x && grads[1] == 0), "pixel_shuffle_projection: no room for the gradient of x");
  check((grads[1] == 0) == (grads[2] == 0), "pixel_shuffle_projection: the gradients of ln_weight and ln_bias come together");
  check(grads[1] == 0 || partial != 0 || tokens == 0, "pixel_shuffle_projection: no room for the partial sums of LayerNorm's gradients");
  py::gil_scoped_release release;
  projection_kernels().backward(p);
}

}  // namespace

void bind_projection(py::module_& m) {
  m.def("pixel_shuffle_projection_block_rows", [] { return projection_kernels().block_rows; });
  m.def("pixel_shuffle_projection_workspace", [](int dtype, const Sizes& sizes, int threads) {
    return workspace_of(checked(dtype), sizes, threads).end;
  }, "floats of the workspace that a call needs");
  m.def("pixel_shuffle_projection_forward", &forward);
  m.def("pixel_shuffle_projection_backward", &backward);
}
