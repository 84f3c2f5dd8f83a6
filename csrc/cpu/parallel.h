// Loops over threads. One that is not worth a second thread must not even ask the OpenMP runtime: a team of one costs a system call.
//
// No thread has to finish its share alone: when a thread is done, it takes over chunks of others, so one that another program has preempted
// does not hold up the loop. So body(i) must not depend on the thread that runs it, except through scratch memory that it fills itself.
#pragma once
#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "longvita/isa.h"

namespace longvita::LV_ISA {

// Work below which a second thread costs more than it brings: multiply-adds, or elements that are read, changed a little and written. Both
// are about 6 to 10 µs on one thread. A second thread that still spins pays from 3 µs on (measured on 2 cores: 16.6 instead of 21.7 µs for a
// whole call of 32,768 elements), one that sleeps only from 80 µs on (waking it takes 40 µs). In training they spin between most calls.
constexpr int64_t kWorthThreads = 1 << 17, kWorthElements = kWorthThreads / 8;

// Between two looks at what another thread writes.
inline void pause_core() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// What is left of one thread's share. On a cache line of its own, because its owner updates it for every chunk.
struct alignas(64) Share {
  std::atomic<int64_t> next;
  int64_t end;
};
constexpr int kMaxShares = 128;                // 8 KiB of stack
constexpr int kHelped = 8;                     // how many other threads' shares a thread checks for work left: each check fetches a cache line
constexpr int64_t kChunks = 8;                 // per share: a preempted thread holds back at most one of them

// body(i) for 0 ≤ i < count, on `threads` threads where that is worth it: many short steps. Each thread begins with a share of its own, the
// same in every call, because much of what it reads is then in its own cache; when that is done, it takes chunks of others.
template <class Body>
void parallel_steps(int64_t count, int threads, bool worth, const Body& body) {
  if (!worth || threads == 1 || count <= 1) {
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
  const int64_t n = std::min<int64_t>({threads, count, kMaxShares}), chunk = std::max<int64_t>(1, count / (n * kChunks));
  Share shares[kMaxShares];
  for (int64_t s = 0; s < n; ++s) {
    shares[s].next.store(count * s / n, std::memory_order_relaxed);
    shares[s].end = count * (s + 1) / n;
  }
  const auto work_on = [&](Share& share) {
    for (int64_t from; (from = share.next.fetch_add(chunk, std::memory_order_relaxed)) < share.end;) {
      for (int64_t i = from; i < std::min(from + chunk, share.end); ++i) body(i);
    }
  };
  // Never fewer threads than in other loops: libgomp would end the rest of them, and start them again for the next loop.
#pragma omp parallel num_threads(threads)
  {
    const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();      // the team may be smaller than asked for
    for (int64_t s = thread; s < n; s += team) work_on(shares[s]);
    for (int64_t i = 1; i <= std::min<int64_t>(kHelped, n - 1); ++i) work_on(shares[(thread + i) % n]);
  }
}

// The same for a few long steps of unequal length: in their order, by whichever thread is free.
template <class Body>
void parallel_tasks(int64_t count, int threads, bool worth, const Body& body) {
  if (!worth || threads == 1 || count <= 1) {
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t i = 0; i < count; ++i) body(i);
}

}  // namespace longvita::LV_ISA
