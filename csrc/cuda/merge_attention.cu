// architectures: sm_80 sm_90a sm_100a
//
// Exact combination of two partial attentions, one pass over memory (equations: longvita_kernels/ops/merge_attention.py).
//
// A row is one token and head. 1 << share neighbouring lanes have one, each kVector elements of it at a time. Rows are numbered so that 8
// tokens of a head follow each other: lse is (heads, tokens), and a sector of 32 bytes of it is then read by one block alone.
#include "merge_attention.h"

#include "launch.cuh"

namespace longvita::cuda {
namespace {

constexpr int kThreads = 256, kTokens = 8;

struct Row {
  int64_t token, head;
  bool inside;
  int lane;      // of the lanes that share this row
};

__device__ Row my_row(const MergeArgs& args, int share) {
  const int64_t row = (int64_t(blockIdx.x) * kThreads + threadIdx.x) >> share;
  const unsigned group = unsigned(row / kTokens), heads = unsigned(args.heads);      // run() sees that 32 bits are enough
  Row mine = {int64_t(group / heads) * kTokens + row % kTokens, group % heads, false, int(threadIdx.x) & ((1 << share) - 1)};
  mine.inside = mine.token < args.tokens;
  return mine;
}

// Shares of the two parts, whether they saw a key (else what stands there is not used: it may be NaN), and the merged lse.
struct Weights {
  float a, b, lse;
  bool sees_a, sees_b;
};

// Both −inf: shares 0, so that the result and every gradient are 0.
__device__ Weights weights(float lse_a, float lse_b) {
  const bool a_larger = lse_a >= lse_b;
  const float larger = a_larger ? lse_a : lse_b, smaller = a_larger ? lse_b : lse_a;
  if (larger == -INFINITY) return {0.0f, 0.0f, -INFINITY, false, false};
  const float e = expf(smaller - larger);
  const float of_larger = 1.0f / (1.0f + e), of_smaller = e / (1.0f + e);
  return {a_larger ? of_larger : of_smaller, a_larger ? of_smaller : of_larger, larger + log1pf(e), lse_a != -INFINITY, lse_b != -INFINITY};
}

template <class T>
__device__ T* start(const Rows3& x, const Row& row) {
  return reinterpret_cast<T*>(x.data) + row.token * x.stride_token + row.head * x.stride_head;
}

template <class T, int kVector>
__global__ void __launch_bounds__(kThreads) merge_forward_kernel(const __grid_constant__ MergeArgs args, int share) {
  const Row row = my_row(args, share);
  if (!row.inside) return;
  const Weights w = weights(args.lse_a.at(row.token, row.head), args.lse_b.at(row.token, row.head));
  const T *a = start<T>(args.out_a, row), *b = start<T>(args.out_b, row);
  T* out = start<T>(args.out, row);
  for (int64_t d = row.lane * kVector; d < args.dim; d += kVector << share) {
    const Pack<T, kVector> of_a = load<T, kVector>(a + d), of_b = load<T, kVector>(b + d);
    float merged[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) merged[i] = (w.sees_a ? w.a * of_a[i] : 0.0f) + (w.sees_b ? w.b * of_b[i] : 0.0f);
    store<T, kVector>(out + d, merged);
  }
  if (row.lane == 0) args.lse.at(row.token, row.head) = w.lse;
}

template <class T, int kVector>
__device__ void store_scaled(const Rows3& to, const Row& row, int64_t d, const float (&grad)[kVector], float weight, bool sees) {
  if (to.data == nullptr) return;
  float scaled[kVector];
#pragma unroll
  for (int i = 0; i < kVector; ++i) scaled[i] = sees ? weight * grad[i] : 0.0f;
  store<T, kVector>(start<T>(to, row) + d, scaled);
}

// With out_a − out = w_b (out_a − out_b): d lse_a = w_a (w_b g·(out_a − out_b) + g_lse), d lse_b = w_b (g_lse − w_a g·(out_a − out_b)).
template <class T, int kVector>
__global__ void __launch_bounds__(kThreads) merge_backward_kernel(const __grid_constant__ MergeArgs args, int share) {
  const Row row = my_row(args, share);
  const bool has_grad = args.out.data != nullptr, needs_dot = args.grad_lse_a.data != nullptr || args.grad_lse_b.data != nullptr;
  Weights w = {};
  float dot = 0.0f;
  if (row.inside) {
    w = weights(args.lse_a.at(row.token, row.head), args.lse_b.at(row.token, row.head));
    for (int64_t d = row.lane * kVector; d < args.dim; d += kVector << share) {
      float grad[kVector] = {};
      if (has_grad) {
        const Pack<T, kVector> of_grad = load<T, kVector>(start<T>(args.out, row) + d);
#pragma unroll
        for (int i = 0; i < kVector; ++i) grad[i] = of_grad[i];
        if (needs_dot && w.sees_a && w.sees_b) {
          const Pack<T, kVector> of_a = load<T, kVector>(start<T>(args.out_a, row) + d), of_b = load<T, kVector>(start<T>(args.out_b, row) + d);
#pragma unroll
          for (int i = 0; i < kVector; ++i) dot = fmaf(grad[i], of_a[i] - of_b[i], dot);
        }
      }
      store_scaled<T, kVector>(args.grad_out_a, row, d, grad, w.a, w.sees_a);
      store_scaled<T, kVector>(args.grad_out_b, row, d, grad, w.b, w.sees_b);
    }
  }
  for (int step = (1 << share) / 2; step > 0; step /= 2) dot += __shfl_xor_sync(0xffffffffu, dot, step);      // lanes outside take part
  if (!row.inside || row.lane != 0) return;
  const float grad_lse = args.lse.data != nullptr ? args.lse.at(row.token, row.head) : 0.0f;
  if (args.grad_lse_a.data != nullptr) args.grad_lse_a.at(row.token, row.head) = w.sees_a ? w.a * (grad_lse + w.b * dot) : 0.0f;
  if (args.grad_lse_b.data != nullptr) args.grad_lse_b.at(row.token, row.head) = w.sees_b ? w.b * (grad_lse - w.a * dot) : 0.0f;
}

// Whether every row of x begins at a multiple of 16 bytes (nothing there: true).
bool rows_aligned(const Rows3& x, int64_t vector) {
  return aligned16(x.data) && x.dim % vector == 0 && x.stride_token % vector == 0 && x.stride_head % vector == 0;
}

template <class T, int kVector, bool kForward>
void launch_rows(const MergeArgs& args, cudaStream_t stream) {
  int share = 0;
  while ((1 << share) < kWarp && (kVector << share) < args.dim) ++share;
  const int64_t groups = (args.tokens + kTokens - 1) / kTokens * args.heads;
  check(groups < 1u << 31, "merge_attention: more than 2^34 rows");
  const int64_t blocks = ((groups * kTokens << share) + kThreads - 1) / kThreads;
  if constexpr (kForward) launch("merge_attention", merge_forward_kernel<T, kVector>, blocks, kThreads, 0, stream, args, share);
  else launch("merge_attention_backward", merge_backward_kernel<T, kVector>, blocks, kThreads, 0, stream, args, share);
}

template <bool kForward>
void run(const MergeArgs& args, cudaStream_t stream) {
  if (args.tokens == 0) return;
  by_dtype(args.dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int kVector = 16 / sizeof(T);
    bool aligned = true;
    for (const Rows3* x : {&args.out_a, &args.out_b, &args.out, &args.grad_out_a, &args.grad_out_b}) aligned &= rows_aligned(*x, kVector);
    if (aligned) launch_rows<T, kVector, kForward>(args, stream);
    else launch_rows<T, 1, kForward>(args, stream);
  });
}

}  // namespace

void merge_attention_forward(const MergeArgs& args, cudaStream_t stream) { run<true>(args, stream); }
void merge_attention_backward(const MergeArgs& args, cudaStream_t stream) { run<false>(args, stream); }

}  // namespace longvita::cuda
