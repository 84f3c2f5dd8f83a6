// Exact combination of two partial attentions, forward and backward: the arguments and their checks, for CPU and GPU alike.
// Equations: longvita_kernels/ops/merge_attention.py.
#pragma once
#include <array>

#include "longvita/views.h"

namespace longvita {

// lse (heads, tokens) with free strides; data may be null where a gradient is absent.
struct Lse {
  float* data = nullptr;
  int64_t stride_head = 0, stride_token = 0;
  LV_BOTH float& at(int64_t token, int64_t head) const { return data[token * stride_token + head * stride_head]; }
};

struct MergeArgs {
  DType dtype = DType::f32;
  int64_t tokens = 0, heads = 0, dim = 0;
  Rows3 out_a, out_b;      // inputs
  Lse lse_a, lse_b;
  Rows3 out;               // forward: result. backward: gradient of it (null: unused)
  Lse lse;
  Rows3 grad_out_a, grad_out_b;      // backward only; null where not needed
  Lse grad_lse_a, grad_lse_b;
};

// As they come from Python: an address, and the strides before the last dimension.
struct MergeInput {
  uintptr_t address;
  std::array<int64_t, 2> stride;
};

inline Lse merge_lse(const MergeArgs& args, MergeInput x, const char* name) {
  check(x.stride[0] >= 0 && x.stride[1] >= 0, name, ": strides must not be negative");
  return {pointer<float>(x.address, x.address == 0 ? 0 : args.heads * args.tokens, name), x.stride[0], x.stride[1]};
}

inline Rows3 merge_rows(const MergeArgs& args, MergeInput x, const char* name) {
  return rows3(x.address, args.dtype, args.tokens, args.heads, args.dim, x.stride[0], x.stride[1], name);
}

// A dense result, or nothing.
inline Rows3 merge_dense(const MergeArgs& args, uintptr_t address, const char* name) {
  return address == 0 ? Rows3{} : merge_rows(args, {address, {args.heads * args.dim, args.dim}}, name);
}

inline MergeArgs merge_inputs(int dtype, const std::array<int64_t, 3>& size, MergeInput out_a, MergeInput lse_a, MergeInput out_b,
                              MergeInput lse_b) {
  check(dtype >= 0 && dtype <= 2, "merge_attention: expected float32, bfloat16 or float16");
  MergeArgs args;
  args.dtype = DType(dtype);
  args.tokens = size[0], args.heads = size[1], args.dim = size[2];
  args.out_a = merge_rows(args, out_a, "out_a");
  args.out_b = merge_rows(args, out_b, "out_b");
  check((lse_a.address != 0 && lse_b.address != 0) || size[0] * size[1] == 0, "merge_attention: lse is null");
  args.lse_a = merge_lse(args, lse_a, "lse_a");
  args.lse_b = merge_lse(args, lse_b, "lse_b");
  return args;
}

}  // namespace longvita
