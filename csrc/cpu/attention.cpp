#include "attention.h"

#include <omp.h>

#include "attention_backward.h"
#include "attention_forward.h"

namespace longvita::LV_ISA {
namespace {

// Sizes by head dimension. What a query block holds stays in half of a 1 MB L2 while the keys pass; a block of K or V is 16 to 32 KB of L1
// or L2, and larger blocks mean fewer passes over the sums.
constexpr int64_t kBlockFloats = 9 << 14;
constexpr int64_t kBackwardKeys = 64, kBackwardPanels = 8;
int64_t forward_keys(int64_t dim) { return std::clamp<int64_t>(16384 / dim / 32 * 32, 64, 128); }

// Fewer panels where there are fewer than eight blocks a thread. (No bit depends on how panels are grouped into blocks.)
template <class Op>
int64_t forward_panels(const AttentionProblem& p) {
  const int64_t fit = kBlockFloats / (p.dim() * kLanes * (1 + Op::kPer) / Op::kPer);
  const int64_t share = p.q.tokens * p.q.heads / (kLanes * 8 * int64_t(p.threads));
  return std::clamp<int64_t>(std::min(fit, share), 2, kMaxPanels);
}
template <class Op>
int64_t backward_panels(int64_t dim) {
  return std::clamp<int64_t>(kBlockFloats / (dim * kLanes * (4 + Op::kPer) / Op::kPer), 2, kBackwardPanels);
}

// Scratch holds one and a half times as many keys as a block should have: what `even_piece` makes of them at most.
template <class Op>
ForwardScratch<Op> forward_scratch(const AttentionProblem& p, Arena& arena) {
  return {arena, forward_panels<Op>(p), forward_keys(p.dim()) * 3 / 2, p.dim()};
}
template <class Op>
BackwardScratch<Op> backward_scratch(const AttentionProblem& p, Arena& arena) {
  int64_t partition = 0;
  for (int64_t d = 0; d < p.docs; ++d) partition = std::max(partition, partition_of(p.cu_k[d + 1] - p.cu_k[d]));
  return {arena, backward_panels<Op>(p.dim()), partition, kBackwardKeys * 3 / 2, p.dim()};
}

AttentionTiles tiles(const AttentionProblem& p, bool backward) {
  AttentionTiles out{};
  with_operands(p.dtype, [&](auto op, auto) {
    using Op = decltype(op);
    Arena arena{nullptr};
    out.query_rows = kLanes * (backward ? backward_scratch<Op>(p, arena).panels : forward_scratch<Op>(p, arena).panels);
    out.scratch = arena.used;
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
  with_operands(f.p.dtype, [&](auto op, auto element) {
    using Op = decltype(op);
    using T = decltype(element);
    for_each_task(f.tasks, f.n_tasks, f.p.threads, [&](const AttentionTask& task, int thread) {
      Arena arena{f.scratch + thread * f.scratch_per_thread};
      const ForwardScratch<Op> scratch = forward_scratch<Op>(f.p, arena);
      const int64_t block = scratch.panels * kLanes, row = task.piece * block;
      for (int64_t unit = task.unit0; unit < task.unit1; ++unit) {
        const Unit u = unit_of(f.p, unit);
        forward_block<Op, T>(f, u, row, std::min(row + block, u.rows()), even_piece(u.keys(), forward_keys(f.p.dim())), scratch);
      }
    });
  });
}

void backward(const AttentionBackward& b) {
  with_operands(b.p.dtype, [&](auto op, auto element) {
    using Op = decltype(op);
    using T = decltype(element);
    Arena measure{nullptr};
    const BackwardScratch<Op> sizes = backward_scratch<Op>(b.p, measure);
    for_each_task(b.tasks, b.n_tasks, b.p.threads, [&](const AttentionTask& task, int thread) {
      Arena arena{b.scratch + thread * b.scratch_per_thread};
      const BackwardScratch<Op> scratch(arena, sizes.panels, sizes.partition, sizes.keys, sizes.dim);
      for (int64_t unit = task.unit0; unit < task.unit1; ++unit) {
        backward_partition<Op, T>(b, unit_of(b.p, unit), task.piece, b.progress + task.progress, kBackwardKeys, scratch);
      }
    });
  });
}

}  // namespace

extern const AttentionKernels attention_kernels = {&tiles, &forward, &backward};

}  // namespace longvita::LV_ISA
