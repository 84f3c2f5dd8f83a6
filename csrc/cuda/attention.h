// Packed attention on Hopper (sm_90a): the problem as a binding hands it over, and the functions that launch it.
// No CUDA header is needed to include this; all pointers in it are device pointers, and nothing is read back to the host.
#pragma once
#include <cstdint>
#include <string>

#include "longvita/dtype.h"
#include "longvita/views.h"

namespace longvita::cuda {

struct AttentionProblem {
  DType dtype = DType::bf16;            // of q, k, v and grad_out: bf16 or f16
  DType result = DType::bf16;           // of out (forward) and of the gradients: dtype, or f32 for parts that are added up later
  Rows3 q, k, v;                        // strides in elements; k and v have the same sizes
  const int32_t* cu_q = nullptr;        // docs + 1 offsets; their values are clamped to the tokens that there are
  const int32_t* cu_k = nullptr;
  int64_t docs = 0;
  double scale = 1.0, softcap = 0.0;
  int64_t left = -1, right = -1;        // window, -1: open; causal is right = 0

  int64_t dim() const { return q.dim; }
  int64_t group() const { return q.heads / k.heads; }
};

struct AttentionForward {
  AttentionProblem p;
  Rows3 out;                            // element type p.result
  float* lse = nullptr;                 // (Hq, Tq) dense, natural logarithm
  float* lse_rest = nullptr;            // likewise: what rounding took from lse
  void* scratch = nullptr;              // attention_scratch(p, false) bytes, 16-byte aligned
  int64_t scratch_bytes = 0;
};

struct AttentionBackward {
  AttentionProblem p;
  Rows3 out, grad_out;                  // element type p.dtype
  const float* lse = nullptr;           // (Hq, Tq); out and lse may be those of more keys than these (ring attention)
  const float* lse_rest = nullptr;      // strides as lse
  const float* grad_lse = nullptr;      // may be null: zeros
  int64_t lse_stride_head = 0, lse_stride_token = 0, grad_lse_stride_head = 0, grad_lse_stride_token = 0;
  Rows3 grad_q, grad_k, grad_v;         // element type p.result; data null: not wanted
  bool add = false;                     // on top of what the gradients hold
  bool single_pass = true;              // dq in the same pass as dk and dv where all are wanted: fewer products, float32 sums in scratch
  void* scratch = nullptr;              // attention_scratch(p, true, single_pass) bytes, 16-byte aligned
  int64_t scratch_bytes = 0;
};

// Why these kernels do not take a problem (head dimension, dtype, softcap, strides that the copy engine cannot follow), or "".
// A problem that is wrong for any kernel throws std::invalid_argument.
std::string attention_cannot(const AttentionProblem& p);
std::string attention_cannot(const AttentionBackward& b);

// Bytes of scratch that a call needs; its contents need not be set.
int64_t attention_scratch(const AttentionProblem& p, bool backward, bool single_pass = false);

// Launch on the current device and a stream (a cudaStream_t). std::invalid_argument for arguments that do not fit or for what
// attention_cannot names; std::runtime_error with CUDA's words if a launch fails.
void attention_forward(const AttentionForward& f, void* stream);
void attention_backward(const AttentionBackward& b, void* stream);

}  // namespace longvita::cuda
