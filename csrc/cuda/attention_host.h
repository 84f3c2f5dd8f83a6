// What the launchers of both directions share: checks, scratch, the list of tiles.
#pragma once
#include <algorithm>
#include <tuple>
#include <utility>

#include "attention.h"
#include "attention_single_pass.cuh"
#include "sm90_launch.h"

namespace longvita::cuda {

// Bytes of scratch taken in order, each part at a multiple of 256.
class Scratch {
 public:
  Scratch(void* data, int64_t bytes) : data_(static_cast<char*>(data)), bytes_(bytes) {}
  template <class T> T* take(int64_t count) {
    T* at = reinterpret_cast<T*>(data_ + used_);
    used_ += (count * int64_t(sizeof(T)) + 255) / 256 * 256;
    check(data_ == nullptr || used_ <= bytes_, "varlen_attention: scratch is too small");
    return at;
  }
  int64_t used() const { return used_; }

 private:
  char* data_;
  int64_t bytes_, used_ = 0;
};

inline Schedule take_schedule(Scratch& scratch, int64_t tokens, int64_t docs) {
  Schedule s;
  s.slots = int(tokens / kTile + docs);
  s.entries = scratch.take<Entry>(s.slots), s.cost = scratch.take<int>(s.slots), s.counters = scratch.take<int>(2);
  return s;
}

// Row statistics of the backward are kept by tile slots of kStatsRows rows, so that every document's begin aligned.
inline int64_t stats_rows(const AttentionProblem& p) { return (p.q.tokens / kStatsRows + p.docs) * kStatsRows; }

struct BackwardScratch {
  Schedule queries, keys;
  float *lse2, *delta;          // (Hq, stats_rows)
  Sums sums;
};
inline BackwardScratch take_backward(Scratch& scratch, const AttentionProblem& p, bool single_pass) {
  const int64_t rows = stats_rows(p) * p.q.heads;
  BackwardScratch b{};
  b.queries = take_schedule(scratch, p.q.tokens, p.docs), b.keys = take_schedule(scratch, p.k.tokens, p.docs);
  b.lse2 = scratch.take<float>(rows), b.delta = scratch.take<float>(rows);
  if (single_pass) b.sums = {scratch.take<float>(rows * p.dim()), scratch.take<int>(rows / kStatsRows * 2), stats_rows(p) / kStatsRows};
  return b;
}

inline int side(int64_t window) { return window < 0 ? kOpen : int(std::min<int64_t>(window, kOpen)); }

inline Documents queries_over_keys(const AttentionProblem& p) {
  return {p.cu_q, p.cu_k, int(p.docs), int(p.q.tokens), int(p.k.tokens), side(p.left), side(p.right)};
}

// Fills the list of tiles and gives the number of blocks for the kernel that works it off.
inline int64_t run_schedule(const Documents& d, const Schedule& s, int64_t heads, void* stream, bool ascending = false) {
  launch(schedule_kernel, ScheduleParameters{d, s, ascending}, 1, kBuckets, sizeof(ScheduleShared), stream);
  return std::max<int64_t>(1, std::min<int64_t>(s.slots * heads, multiprocessors()));
}

inline Target target(const Rows3& x, const AttentionProblem& p) { return {x.data, x.stride_token, x.stride_head, p.result == DType::f32}; }

// Results are written 16 bytes at a time (float32: 8).
inline std::string store_cannot(const Rows3& x, DType type, const char* name) {
  const int64_t unit = 16 / int64_t(dtype_size(type));
  if (reinterpret_cast<uintptr_t>(x.data) % 16 != 0) return std::string(name) + " does not begin at a multiple of 16 bytes";
  if (x.stride_token % unit != 0 || x.stride_head % unit != 0) return std::string(name) + "'s rows are not multiples of 16 bytes apart";
  return "";
}

inline void check_problem(const AttentionProblem& p) {
  check(p.q.heads > 0 && p.k.heads > 0 && p.q.heads % p.k.heads == 0, "varlen_attention: query heads must be a multiple of the KV heads");
  check(p.q.dim == p.k.dim && p.k.dim == p.v.dim, "varlen_attention: head dims of q, k and v must agree");
  check(p.k.tokens == p.v.tokens && p.k.heads == p.v.heads, "varlen_attention: k and v must have the same sizes");
  check(p.result == p.dtype || p.result == DType::f32, "varlen_attention: results come in the dtype of q or in float32");
  check(p.scale > 0 && p.softcap >= 0, "varlen_attention: scale must be positive, softcap not negative");
  check(p.docs >= 0 && (p.docs == 0 || (p.cu_q && p.cu_k)), "varlen_attention: the documents' offsets are missing");
  const int64_t limit = int64_t(1) << 30;       // tokens and slots of tiles are 32-bit, with room for a window beside them
  check(p.q.tokens < limit && p.k.tokens < limit && p.docs < limit, "varlen_attention: at most 2^30 tokens and documents");
}

inline void check_can(const std::string& why) { check(why.empty(), "varlen_attention on Hopper: ", why); }

// Calls f with the kernels' element type and head dimension: f(bf16_t{}, std::integral_constant<int, 128>{}).
template <class F> void with_types(const AttentionProblem& p, F f) {
  const auto with_dim = [&](auto element) {
    if (p.dim() == 64) f(element, std::integral_constant<int, 64>{});
    else f(element, std::integral_constant<int, 128>{});
  };
  if (p.dtype == DType::bf16) with_dim(bf16_t{});
  else with_dim(f16_t{});
}

}  // namespace longvita::cuda
