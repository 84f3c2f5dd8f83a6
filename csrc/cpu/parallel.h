// Loops over threads. One that is not worth a second thread must not even ask the OpenMP runtime: a team of one costs a system call.
#pragma once
#include <omp.h>

#include <cstdint>

#include "longvita/isa.h"

namespace longvita::LV_ISA {

constexpr int64_t kWorthThreads = 1 << 17;     // multiply-adds (about 10 µs of them) below which waking a second thread costs more than it brings

// body(i) for 0 ≤ i < count, on `threads` threads where that is worth it: many equal steps, or (tasks) a few long ones of unequal length.
template <class Body>
void parallel_steps(int64_t count, int threads, bool worth, const Body& body) {
  if (!worth || threads == 1) {
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < count; ++i) body(i);
}
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
