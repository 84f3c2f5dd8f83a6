#include "attention.h"

#include <omp.h>

#include "attention_backward.h"
#include "attention_forward.h"

namespace longvita::LV_ISA {
namespace {

// Sizes by head dimension, so that what is used over and over stays in a 32 KB L1 and half of a 1 MB L2.
int64_t panels_of(int64_t dim) { return std::clamp<int64_t>(32768 / (dim * kLanes), 2, 8); }
int64_t forward_keys(int64_t dim) { return std::clamp<int64_t>(8192 / dim / 32 * 32, 64, 128); }
int64_t partition_of(int64_t dim) { return std::clamp<int64_t>(32768 / dim / 64 * 64, 128, 1024); }
constexpr int64_t kBackwardKeys = 64;

AttentionTiles tiles(const AttentionProblem& p) {
  AttentionTiles out{};
  const int64_t dim = p.dim(), panels = panels_of(dim);
  out.query_rows = panels * kLanes;
  out.partition = partition_of(dim);
  with_operands(p.dtype, [&](auto op, auto) {
    using Op = decltype(op);
    Arena forward{nullptr}, backward{nullptr};
    ForwardScratch<Op> f(forward, panels, forward_keys(dim), dim);
    BackwardScratch<Op> b(backward, panels, out.partition, kBackwardKeys, dim);
    out.forward_scratch = forward.used, out.backward_scratch = backward.used;
  });
  return out;
}

// f(task, thread) for every task, started in the given order, by whichever thread is free.
template <class F>
void for_each_task(const AttentionTask* tasks, int64_t n, int threads, F f) {
  if (threads <= 1 || n <= 1) {
    for (int64_t i = 0; i < n; ++i) f(tasks[i], 0);
    return;
  }
#pragma omp parallel for schedule(monotonic : dynamic, 1) num_threads(threads)
  for (int64_t i = 0; i < n; ++i) f(tasks[i], omp_get_thread_num());
}

void forward(const AttentionForward& f) {
  const int64_t dim = f.p.dim(), panels = panels_of(dim), block = panels * kLanes;
  with_operands(f.p.dtype, [&](auto op, auto element) {
    using Op = decltype(op);
    using T = decltype(element);
    for_each_task(f.tasks, f.n_tasks, f.p.threads, [&](const AttentionTask& task, int thread) {
      Arena arena{f.scratch + thread * f.scratch_per_thread};
      const ForwardScratch<Op> scratch(arena, panels, forward_keys(dim), dim);
      for (int64_t unit = task.unit0; unit < task.unit1; ++unit) {
        const Unit u = unit_of(f.p, unit);
        const int64_t row = task.piece * block;
        forward_block<Op, T>(f, u, row, std::min(row + block, u.rows()), scratch);
      }
    });
  });
}

void backward(const AttentionBackward& b) {
  const int64_t dim = b.p.dim(), panels = panels_of(dim);
  with_operands(b.p.dtype, [&](auto op, auto element) {
    using Op = decltype(op);
    using T = decltype(element);
    for_each_task(b.tasks, b.n_tasks, b.p.threads, [&](const AttentionTask& task, int thread) {
      Arena arena{b.scratch + thread * b.scratch_per_thread};
      const BackwardScratch<Op> scratch(arena, panels, partition_of(dim), kBackwardKeys, dim);
      for (int64_t unit = task.unit0; unit < task.unit1; ++unit) {
        backward_partition<Op, T>(b, unit_of(b.p, unit), task.piece, b.progress + task.progress, scratch);
      }
    });
  });
}

}  // namespace

extern const AttentionKernels attention_kernels = {&tiles, &forward, &backward};

}  // namespace longvita::LV_ISA
