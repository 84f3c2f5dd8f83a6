// architectures: sm_90a
// wgmma: keys_kernel queries_kernel
// Launches the backward kernels of packed attention (attention_backward.cuh).
#include "attention_backward.cuh"

#include "attention_host.h"

namespace longvita::cuda {
namespace {

void check_backward(const AttentionBackward& b) {
  const AttentionProblem& p = b.p;
  const auto sized = [](const Rows3& x, const Rows3& like, const char* name) {
    check(x.tokens == like.tokens && x.heads == like.heads && x.dim == like.dim, "varlen_attention: ", name, " has a wrong size");
  };
  sized(b.out, p.q, "out"), sized(b.grad_out, p.q, "grad_out");
  if (b.grad_q.data) sized(b.grad_q, p.q, "grad_q");
  if (b.grad_k.data) sized(b.grad_k, p.k, "grad_k");
  if (b.grad_v.data) sized(b.grad_v, p.k, "grad_v");
  check(p.q.tokens == 0 || (b.lse && b.lse_rest), "varlen_attention: lse or lse_rest is missing");
  check(p.q.tokens + p.k.tokens == 0 || b.scratch, "varlen_attention: scratch is missing");
}

RowsParameters rows_parameters(const AttentionBackward& b, const BackwardScratch& scratch) {
  RowsParameters r{};
  r.out = b.out.data, r.out_token = b.out.stride_token, r.out_head = b.out.stride_head;
  r.grad = b.grad_out.data, r.grad_token = b.grad_out.stride_token, r.grad_head = b.grad_out.stride_head;
  r.lse = b.lse, r.lse_rest = b.lse_rest, r.lse_head = b.lse_stride_head, r.lse_token = b.lse_stride_token;
  r.grad_lse = b.grad_lse, r.grad_lse_head = b.grad_lse_stride_head, r.grad_lse_token = b.grad_lse_stride_token;
  r.documents = queries_over_keys(b.p), r.lse2 = scratch.lse2, r.delta = scratch.delta;
  r.padded = stats_rows(b.p), r.sums = scratch.sums, r.heads = int(b.p.q.heads);
  return r;
}

SumsParameters sums_parameters(const AttentionBackward& b, const BackwardScratch& scratch) {
  return {scratch.sums, queries_over_keys(b.p), target(b.grad_q, b.p), int(b.p.q.heads), float(b.p.scale), b.add};
}

}  // namespace

std::string attention_cannot(const AttentionBackward& b) {
  if (const std::string why = attention_cannot(b.p); !why.empty()) return why;
  if (const std::string why = map_cannot(b.grad_out, "grad_out"); !why.empty()) return why;
  if (const std::string why = store_cannot(b.out, b.p.dtype, "out"); !why.empty()) return why;
  for (const auto& [x, name] : {std::pair(&b.grad_q, "grad_q"), std::pair(&b.grad_k, "grad_k"), std::pair(&b.grad_v, "grad_v")}) {
    if (const std::string why = x->data ? store_cannot(*x, b.p.result, name) : ""; !why.empty()) return why;
  }
  return "";
}

void attention_backward(const AttentionBackward& b, void* stream) {
  const AttentionProblem& p = b.p;
  check_can(attention_cannot(b));
  check_backward(b);
  if (p.docs == 0) return;
  const bool want_keys = p.k.tokens > 0 && (b.grad_k.data || b.grad_v.data), want_queries = p.q.tokens > 0 && b.grad_q.data;
  const bool single = b.single_pass && want_keys && want_queries;
  Scratch memory(b.scratch, b.scratch_bytes);
  const BackwardScratch scratch = take_backward(memory, p, single);
  BackwardParameters queries{};
  queries.documents = queries_over_keys(p), queries.schedule = scratch.queries;
  queries.lse2 = scratch.lse2, queries.delta = scratch.delta, queries.padded = stats_rows(p);
  queries.heads = int(p.q.heads), queries.group = int(p.group());
  queries.scale = float(p.scale), queries.scale2 = float(p.scale * 1.4426950408889634), queries.add = b.add;
  // A map of a tensor without tokens is never loaded from.
  const Rows3* sides[4] = {&p.q, &b.grad_out, &p.k, &p.v};
  TensorMap* maps[4] = {&queries.mine[0], &queries.mine[1], &queries.theirs[0], &queries.theirs[1]};
  for (int i = 0; i < 4; ++i) {
    if (sides[i]->tokens > 0) *maps[i] = tensor_map(*sides[i], p.dtype, kBoxRows, kSwizzleRow);
  }
  BackwardParameters keys = queries;            // the same with queries and keys exchanged
  const Documents& d = queries.documents;
  keys.documents = {d.cu_columns, d.cu_rows, d.docs, d.columns, d.rows, d.right, d.left}, keys.schedule = scratch.keys;
  for (int i = 0; i < 2; ++i) keys.mine[i] = queries.theirs[i], keys.theirs[i] = queries.mine[i];
  keys.heads = int(p.k.heads), keys.sums = scratch.sums;
  keys.target[0] = target(b.grad_k, p), keys.target[1] = target(b.grad_v, p), queries.target[0] = target(b.grad_q, p);
  with_types(p, [&](auto element, auto dim) {
    using T = decltype(element);
    constexpr int D = dim();
    const int64_t slots = stats_rows(p) / kStatsRows * p.q.heads;
    if (p.q.tokens > 0) launch(rows_kernel<T, D>, rows_parameters(b, scratch), slots, kRowsThreads, 0, stream);
    if (want_keys) {
      const int64_t blocks = run_schedule(keys.documents, keys.schedule, keys.heads, stream, single);
      if (single) launch(keys_kernel<T, D, true>, keys, blocks, kThreads, sizeof(KeysShared<D, true>), stream);
      else launch(keys_kernel<T, D, false>, keys, blocks, kThreads, sizeof(KeysShared<D, false>), stream);
    }
    if (single) {
      launch(sums_kernel<T, D>, sums_parameters(b, scratch), slots, kSumsThreads, 0, stream);
    } else if (want_queries) {
      const int64_t blocks = run_schedule(queries.documents, queries.schedule, queries.heads, stream);
      launch(queries_kernel<T, D>, queries, blocks, kThreads, sizeof(QueriesShared<D>), stream);
    }
  });
}

}  // namespace longvita::cuda
