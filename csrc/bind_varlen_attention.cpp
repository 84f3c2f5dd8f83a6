// varlen_attention: argument checks, cutting the problem into tasks.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <numeric>
#include <vector>

#include "attention.h"
#include "longvita/errors.h"

namespace py = pybind11;

namespace longvita {
namespace {

using Sizes = std::array<int64_t, 3>;
using Strides = std::array<int64_t, 3>;

Rows3 tensor(uintptr_t address, DType dtype, const Sizes& size, const Strides& stride, const char* name) {
  // torch calls an empty tensor contiguous whatever its strides are
  check(stride[2] == 1 || size[2] == 1 || size[0] == 0, name, ": the last dimension must be contiguous");
  return rows3(address, dtype, size[0], size[1], size[2], stride[0], stride[1], name);
}

// In the words of ops/_common.py, which checks where this kernel does not run.
void check_offsets(const int32_t* cu, int64_t docs, int64_t tokens, const char* name) {
  check(cu[0] == 0, name, " starts at ", cu[0], "; expected 0");
  check(cu[docs] == tokens, name, " ends at ", cu[docs], " but there are ", tokens, " tokens; its last entry must be the number of tokens");
  for (int64_t i = 0; i < docs; ++i) {
    check(cu[i] <= cu[i + 1], name, " falls from ", cu[i], " to ", cu[i + 1], " at index ", i + 1, "; document offsets must not decrease");
  }
}

struct VarlenProblem : AttentionProblem {
  VarlenProblem(int code, uintptr_t q_, Sizes q_size, Strides q_stride, uintptr_t k_, Sizes k_size, Strides k_stride, uintptr_t v_,
                Strides v_stride, uintptr_t cu_q_, uintptr_t cu_k_, int64_t offsets, double scale_, int64_t left_, int64_t right_,
                double softcap_, int threads_, int result_) {
    check(code >= 0 && code <= 2, "varlen_attention: dtype must be float32, bfloat16 or float16");
    check(result_ == code || result_ == int(DType::f32), "varlen_attention: results come in the dtype of q or in float32");
    check(threads_ >= 1 && offsets >= 1, "varlen_attention: at least one thread and one offset");
    check(q_size[2] == k_size[2] && q_size[2] % 8 == 0 && q_size[2] <= 256, "varlen_attention: head dims must agree, a multiple of 8 up to 256");
    check(scale_ > 0 && softcap_ >= 0, "varlen_attention: scale must be positive, softcap not negative");
    dtype = DType(code), result = DType(result_);
    q = tensor(q_, dtype, q_size, q_stride, "q");
    k = tensor(k_, dtype, k_size, k_stride, "k");
    v = tensor(v_, dtype, k_size, v_stride, "v");
    check(q.heads % k.heads == 0, "varlen_attention: query heads must be a multiple of the KV heads");
    docs = offsets - 1;
    cu_q = pointer<const int32_t>(cu_q_, offsets, "cu_seqlens_q"), cu_k = pointer<const int32_t>(cu_k_, offsets, "cu_seqlens_k");
    check_offsets(cu_q, docs, q.tokens, "cu_seqlens_q");
    check_offsets(cu_k, docs, k.tokens, "cu_seqlens_k");
    scale = scale_, softcap = softcap_, left = left_ < 0 ? -1 : left_, right = right_ < 0 ? -1 : right_, threads = threads_;
  }
};

// Visible (row, key) pairs of query positions [i0, i1), about: from the middle position.
int64_t area(const AttentionProblem& p, int64_t queries, int64_t keys, int64_t i0, int64_t i1) {
  const int64_t aligned = (i0 + i1) / 2 + keys - queries;
  const int64_t low = p.left < 0 ? 0 : std::max<int64_t>(0, aligned - p.left);
  const int64_t high = p.right < 0 ? keys : std::min(keys, aligned + p.right + 1);
  return (i1 - i0) * p.group() * std::max<int64_t>(high - low, 1) + 1;
}

// Small units are gathered until a task is worth its start; large ones are cut into pieces. Longest first. The cut decides only who
// computes what, never in which order anything is summed.
class Planner {
 public:
  std::vector<AttentionTask> tasks;
  int64_t counters = 0;      // for AttentionBackward::progress

  Planner(const AttentionProblem& p, const AttentionTiles& t, bool backward) : p_(p), t_(t) {
    int64_t total = 0;
    each_unit([&](int64_t, int64_t queries, int64_t keys) { total += area(p, queries, keys, 0, queries); });
    // the lower bound: some 20 µs of work, below which waking a thread costs more than it brings
    enough_ = std::max((int64_t(1) << 17) / p.dim(), std::min((int64_t(1) << 22) / p.dim(), total / (4 * p.threads) + 1));
    each_unit([&](int64_t unit, int64_t queries, int64_t keys) {
      const int64_t all = backward ? keys : queries * p.group(), each = backward ? partition_of(keys) : t.query_rows;
      const int64_t pieces = (all + each - 1) / each;
      if (pieces <= 1) gather(unit, area(p, queries, keys, 0, queries) + keys);
      else if (backward) cut_keys(unit, queries, keys, pieces);
      else cut_rows(unit, queries, keys, pieces);
    });
    flush();
    std::stable_sort(tasks.begin(), tasks.end(), [](const AttentionTask& a, const AttentionTask& b) { return a.cost > b.cost; });
  }

 private:
  template <class F>
  void each_unit(F f) {
    for (int64_t unit = 0; unit < p_.docs * p_.kv_heads(); ++unit) {
      const int64_t d = unit / p_.kv_heads();
      f(unit, p_.cu_q[d + 1] - p_.cu_q[d], p_.cu_k[d + 1] - p_.cu_k[d]);
    }
  }
  void gather(int64_t unit, int64_t cost) {
    if (gathered_.cost == 0) gathered_ = {unit, unit, 0, 0, 0};
    gathered_.unit1 = unit + 1;
    gathered_.cost += cost;
    if (gathered_.cost >= enough_) flush();
  }
  void flush() {
    if (gathered_.cost > 0) tasks.push_back(gathered_);
    gathered_ = {};
  }
  void cut_rows(int64_t unit, int64_t queries, int64_t keys, int64_t pieces) {
    flush();
    for (int64_t i = 0; i < pieces; ++i) {
      const int64_t i0 = i * t_.query_rows / p_.group(), i1 = std::min(queries, (i + 1) * t_.query_rows / p_.group());
      tasks.push_back({unit, unit + 1, i, 0, area(p_, queries, keys, i0, std::max(i1, i0 + 1))});
    }
  }
  // A partition never costs less than a later one here, so that sorting keeps their order: a task waits for the partition before its own.
  void cut_keys(int64_t unit, int64_t queries, int64_t keys, int64_t pieces) {
    flush();
    const size_t start = tasks.size();
    const int64_t partition = partition_of(keys);
    for (int64_t i = 0; i < pieces; ++i) {
      const int64_t low = i * partition - (keys - queries), high = low + partition;      // positions aligned with these keys
      const int64_t first = p_.right < 0 ? 0 : std::max<int64_t>(0, low - p_.right);
      const int64_t last = p_.left < 0 ? queries : std::min(queries, high + p_.left);
      tasks.push_back({unit, unit + 1, i, counters, std::max<int64_t>(1, last - first) * p_.group() * partition});
    }
    for (size_t i = tasks.size() - 1; i > start; --i) tasks[i - 1].cost = std::max(tasks[i - 1].cost, tasks[i].cost);
    counters += (queries * p_.group() + t_.query_rows - 1) / t_.query_rows;
  }

  const AttentionProblem& p_;
  const AttentionTiles& t_;
  int64_t enough_ = 0;
  AttentionTask gathered_{};
};

// fp32 sums for grad_q beside grad_q itself: only where that is 16 bits wide and some document has more than one partition.
int64_t partial_floats(const VarlenProblem& p) {
  if (p.result == DType::f32) return 0;
  for (int64_t d = 0; d < p.docs; ++d) {
    if (const int64_t keys = p.cu_k[d + 1] - p.cu_k[d]; keys > partition_of(keys)) return p.q.tokens * p.q.heads * p.q.dim;
  }
  return 0;
}

int64_t scratch(const VarlenProblem& p, bool backward) {
  return p.threads * attention_kernels().tiles(p, backward).scratch + (backward ? partial_floats(p) : 0);
}

void check_scratch(const VarlenProblem& p, bool backward, int64_t size) {
  check(size >= scratch(p, backward), "varlen_attention: scratch is too small");
}

void forward(const VarlenProblem& p, uintptr_t out, uintptr_t lse, uintptr_t lse_rest, uintptr_t buffer, int64_t size) {
  check_scratch(p, false, size);
  const AttentionTiles t = attention_kernels().tiles(p, false);
  py::gil_scoped_release release;
  const Planner plan(p, t, false);
  AttentionForward f;
  f.p = p;
  f.out = rows3(out, p.result, p.q.tokens, p.q.heads, p.q.dim, p.q.heads * p.q.dim, p.q.dim, "out");
  f.lse = pointer<float>(lse, p.q.tokens * p.q.heads, "lse");
  f.lse_rest = pointer<float>(lse_rest, p.q.tokens * p.q.heads, "lse_rest");
  f.tasks = plan.tasks.data(), f.n_tasks = int64_t(plan.tasks.size());
  f.scratch = pointer<float>(buffer, size, "scratch"), f.scratch_per_thread = t.scratch;
  attention_kernels().forward(f);
}

void backward(const VarlenProblem& p, uintptr_t out, Strides out_stride, uintptr_t lse, uintptr_t lse_rest,
              std::array<int64_t, 2> lse_stride, uintptr_t grad_out, Strides grad_out_stride, uintptr_t grad_lse,
              std::array<int64_t, 2> grad_lse_stride, std::array<uintptr_t, 3> grads, std::array<bool, 3> needs, uintptr_t buffer, int64_t size) {
  check_scratch(p, true, size);
  const AttentionTiles t = attention_kernels().tiles(p, true);
  AttentionBackward b;
  b.p = p;
  const Sizes q_size = {p.q.tokens, p.q.heads, p.q.dim};
  b.out = tensor(out, p.dtype, q_size, out_stride, "out");
  b.grad_out = tensor(grad_out, p.dtype, q_size, grad_out_stride, "grad_out");
  const int64_t rows = p.q.tokens * p.q.heads;
  b.lse_rest = pointer<const float>(lse_rest, rows, "lse_rest");
  b.lse = pointer<const float>(lse, rows, "lse"), b.lse_stride_head = lse_stride[0], b.lse_stride_token = lse_stride[1];
  b.grad_lse = reinterpret_cast<const float*>(grad_lse);
  b.grad_lse_stride_head = grad_lse_stride[0], b.grad_lse_stride_token = grad_lse_stride[1];
  if (needs[0]) b.grad_q = pointer<char>(grads[0], rows * p.q.dim, "grad_q");
  if (needs[1]) b.grad_k = pointer<char>(grads[1], p.k.tokens * p.k.heads * p.k.dim, "grad_k");
  if (needs[2]) b.grad_v = pointer<char>(grads[2], p.k.tokens * p.k.heads * p.k.dim, "grad_v");
  b.scratch = pointer<float>(buffer, size, "scratch"), b.scratch_per_thread = t.scratch;
  py::gil_scoped_release release;
  const Planner plan(p, t, true);
  std::vector<int32_t> progress(size_t(plan.counters), 0);
  b.tasks = plan.tasks.data(), b.n_tasks = int64_t(plan.tasks.size());
  b.progress = progress.data();
  b.partial = p.result == DType::f32 ? reinterpret_cast<float*>(b.grad_q) : b.scratch + p.threads * t.scratch;
  attention_kernels().backward(b);
}

}  // namespace
}  // namespace longvita

void bind_varlen_attention(py::module_& m) {
  using namespace longvita;
  py::class_<VarlenProblem>(m, "VarlenProblem", "Arguments common to forward and backward, checked once.")
      .def(py::init<int, uintptr_t, Sizes, Strides, uintptr_t, Sizes, Strides, uintptr_t, Strides, uintptr_t, uintptr_t, int64_t, double,
                    int64_t, int64_t, double, int, int>());
  m.def("varlen_attention_scratch", &scratch, "floats of scratch that a call needs: problem, backward?");
  m.def("varlen_attention_forward", &forward);
  m.def("varlen_attention_backward", &backward);
}
