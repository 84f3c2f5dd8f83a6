// architectures: sm_90a
// wgmma: forward_kernel
// Launches the forward kernel of packed attention (attention_forward.cuh).
#include "attention_forward.cuh"

#include "attention_host.h"

namespace longvita::cuda {

std::string attention_cannot(const AttentionProblem& p) {
  check_problem(p);
  if (const std::string why = device_cannot(); !why.empty()) return why;
  if (p.dtype != DType::bf16 && p.dtype != DType::f16) return "q, k and v must be bfloat16 or float16";
  if (p.dim() != 64 && p.dim() != 128) return "the head dimension must be 64 or 128";
  if (p.softcap > 0) return "there is no softcap";
  for (const auto& [x, name] : {std::pair(&p.q, "q"), std::pair(&p.k, "k"), std::pair(&p.v, "v")}) {
    if (const std::string why = map_cannot(*x, name); !why.empty()) return why;
  }
  return "";
}

int64_t attention_scratch(const AttentionProblem& p, bool backward, bool single_pass) {
  check_problem(p);
  Scratch none(nullptr, 0);
  if (backward) take_backward(none, p, single_pass);
  else take_schedule(none, p.q.tokens, p.docs);
  return none.used();
}

void attention_forward(const AttentionForward& f, void* stream) {
  const AttentionProblem& p = f.p;
  check_can(attention_cannot(p));
  check_can(store_cannot(f.out, p.result, "out"));
  check(f.out.tokens == p.q.tokens && f.out.heads == p.q.heads && f.out.dim == p.q.dim, "varlen_attention: out must have the sizes of q");
  check(p.q.tokens == 0 || (f.lse && f.lse_rest && f.scratch), "varlen_attention: lse, lse_rest or scratch is missing");
  if (p.q.tokens == 0 || p.docs == 0) return;
  Scratch scratch(f.scratch, f.scratch_bytes);
  ForwardParameters k{};
  k.documents = queries_over_keys(p), k.schedule = take_schedule(scratch, p.q.tokens, p.docs);
  k.q = tensor_map(p.q, p.dtype, kBoxRows, kSwizzleRow);
  if (p.k.tokens > 0) k.k = tensor_map(p.k, p.dtype, kBoxRows, kSwizzleRow), k.v = tensor_map(p.v, p.dtype, kBoxRows, kSwizzleRow);
  else k.k = k.v = k.q;         // never loaded from
  k.out = target(f.out, p), k.lse = f.lse, k.lse_rest = f.lse_rest;
  k.heads = int(p.q.heads), k.group = int(p.group()), k.scale2 = float(p.scale * 1.4426950408889634);
  const int64_t blocks = run_schedule(k.documents, k.schedule, p.q.heads, stream);
  with_types(p, [&](auto element, auto dim) {
    launch(forward_kernel<decltype(element), dim()>, k, blocks, kThreads, sizeof(ForwardShared<dim()>), stream);
  });
}

}  // namespace longvita::cuda
