// Exact combination of two partial attentions; equations in longvita_kernels/ops/merge_attention.py.
#pragma once
#include "longvita/isa.h"
#include "longvita/views.h"

namespace longvita {

// lse (heads, tokens) with free strides; data may be null where a gradient is absent.
struct Lse {
  float* data = nullptr;
  int64_t stride_head = 0, stride_token = 0;
  float& at(int64_t token, int64_t head) const { return data[token * stride_token + head * stride_head]; }
};

struct MergeArgs {
  DType dtype = DType::f32;
  int64_t tokens = 0, heads = 0, dim = 0;
  int threads = 1;
  Rows3 out_a, out_b;      // inputs
  Lse lse_a, lse_b;
  Rows3 out;               // forward: result. backward: gradient of it (null: unused)
  Lse lse;
  Rows3 grad_out_a, grad_out_b;      // backward only; null where not needed
  Lse grad_lse_a, grad_lse_b;
};

struct MergeKernels {
  void (*forward)(const MergeArgs&);
  void (*backward)(const MergeArgs&);
};

}  // namespace longvita
LV_DECLARE_KERNELS(MergeKernels, merge_kernels)
