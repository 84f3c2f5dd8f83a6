// Kernels of csrc/cuda/ on the CPU. A block's threads are coroutines that run in turn up to the next barrier or collective of their warp;
// blocks run one after the other. Shared memory is filled with NaN before each block; a block in which some threads wait for others that
// have ended stops the process. Only for tests.
#pragma once
#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <vector>

#include "cuda_runtime_api.h"

#define __global__
#define __device__
#define __host__
#define __shared__
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

struct dim3 {
  unsigned x, y = 1, z = 1;
  dim3(unsigned x_ = 1) : x(x_) {}
};
struct alignas(16) uint4 { unsigned x, y, z, w; };

namespace longvita::cuda {
constexpr size_t kSharedBytes = 227 << 10;
inline unsigned char dynamic_shared[kSharedBytes + 4096] __attribute__((aligned(128)));
}  // namespace longvita::cuda

namespace emulated {

constexpr size_t kStack = 64 << 10, kDeposit = 32;

struct Group {      // threads that meet: a block's at a barrier, a warp's at a collective
  int members = 0, arrived = 0;
  unsigned meetings = 0;
  unsigned char deposits[2][32][kDeposit];      // of the present meeting and the one before
};

struct Thread {
  ucontext_t context;
  dim3 index;
  bool done = false;
};

inline ucontext_t scheduler;
inline Thread* current = nullptr;
inline dim3 block_index, block_size, gridDim;
inline Group block;
inline std::vector<Group> warps;
inline std::function<void()> body;
inline unsigned long progress = 0;

inline void meet(Group& group) {
  const unsigned meeting = group.meetings;
  ++progress;
  if (++group.arrived == group.members) group.arrived = 0, ++group.meetings;
  while (group.meetings == meeting) swapcontext(&current->context, &scheduler);
}

// What each lane of the warp gave, when all have given it.
template <class T>
struct Given {
  const unsigned char (*deposits)[kDeposit];
  T operator[](int lane) const {
    T value;
    std::memcpy(&value, deposits[lane], sizeof value);
    return value;
  }
};
template <class T>
Given<T> give(const T& value) {
  static_assert(sizeof(T) <= kDeposit);
  Group& warp = warps[current->index.x / 32];
  auto& deposits = warp.deposits[warp.meetings % 2];
  std::memcpy(deposits[current->index.x % 32], &value, sizeof value);
  meet(warp);
  return {deposits};
}

inline void enter() {
  body();
  current->done = true, ++progress;
  swapcontext(&current->context, &scheduler);
}

inline void run_block(size_t shared) {
  using longvita::cuda::dynamic_shared;
  std::memset(dynamic_shared, 0xff, sizeof dynamic_shared);
  static std::vector<std::unique_ptr<char[]>> stacks;
  static std::vector<Thread> threads;
  while (stacks.size() < block_size.x) stacks.emplace_back(new char[kStack]);
  threads.assign(block_size.x, {});
  block = {}, block.members = int(block_size.x);
  warps.assign(block_size.x / 32, {});
  for (Group& warp : warps) warp.members = 32;
  for (unsigned i = 0; i < block_size.x; ++i) {
    threads[i].index.x = i;
    getcontext(&threads[i].context);
    threads[i].context.uc_stack.ss_sp = stacks[i].get(), threads[i].context.uc_stack.ss_size = kStack;
    makecontext(&threads[i].context, enter, 0);
  }
  for (unsigned left = block_size.x; left > 0;) {
    const unsigned long before = progress;
    left = 0;
    for (Thread& thread : threads) {
      if (thread.done) continue;
      current = &thread;
      swapcontext(&scheduler, &thread.context);
      left += !thread.done;
    }
    if (left > 0 && progress == before) std::fprintf(stderr, "a block waits for threads that have ended\n"), std::abort();
  }
  for (size_t i = shared; i < sizeof dynamic_shared; ++i) {
    if (dynamic_shared[i] != 0xff) std::fprintf(stderr, "a block wrote beyond its %zu bytes of shared memory\n", shared), std::abort();
  }
}

}  // namespace emulated

enum { cudaFuncAttributeMaxDynamicSharedMemorySize };
inline cudaError_t cudaFuncSetAttribute(const void*, int, int bytes) {
  return size_t(bytes) <= longvita::cuda::kSharedBytes ? cudaSuccess : cudaErrorInvalidValue;
}
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};
template <class... Parameters, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Args... args) {
  if (config->blockDim.x % 32 || config->blockDim.x > 1024 || config->gridDim.x == 0) return cudaErrorInvalidValue;
  emulated::gridDim = config->gridDim, emulated::block_size = config->blockDim;
  emulated::body = [&] { kernel(args...); };
  for (unsigned i = 0; i < config->gridDim.x; ++i) emulated::block_index.x = i, emulated::run_block(config->dynamicSmemBytes);
  return cudaSuccess;
}

#define threadIdx (emulated::current->index)
#define blockIdx (emulated::block_index)
using emulated::gridDim;

inline void __syncthreads() { emulated::meet(emulated::block); }
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) { return emulated::give(value)[int(threadIdx.x % 32) ^ mask]; }
template <class T>
T __ldcs(const T* from) { return *from; }
inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
