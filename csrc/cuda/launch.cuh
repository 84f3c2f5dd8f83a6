// What the kernels share: the launch, 16 bytes at a time, element types.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstring>

#include "longvita/dtype.h"
#include "succeed.h"

namespace longvita::cuda {

constexpr int kWarp = 32;

// Dynamic shared memory of a block, as much as its launch asked for.
extern __shared__ __align__(128) unsigned char dynamic_shared[];

inline int attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  succeed(cudaGetDevice(&device), "asking for the current device");
  succeed(cudaDeviceGetAttribute(&value, which, device), "asking for an attribute of the device");
  return value;
}

// kernel<<<blocks, threads, shared, stream>>>(args...) with an error that names it, and as much shared memory as the device allows.
template <class... Parameters, class... Args>
void launch(const char* name, void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared, cudaStream_t stream, Args... args) {
  check(blocks <= 0x7fffffff, name, ": ", blocks, " blocks are more than a grid has");
  if (shared > 48 << 10) {
    succeed(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)), name);
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(blocks)), config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = shared, config.stream = stream;
  succeed(cudaLaunchKernelEx(&config, kernel, Parameters(args)...), name);
}

// run(T{}) for the element type of a dtype that kernels take.
template <class Run>
void by_dtype(DType dtype, Run run) {
  if (dtype == DType::f32) run(float{});
  else if (dtype == DType::bf16) run(__nv_bfloat16{});
  else run(__half{});
}

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }

template <class T> __device__ T from_float(float x);
template <> __device__ inline float from_float<float>(float x) { return x; }
template <> __device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }
template <> __device__ inline __half from_float<__half>(float x) { return __float2half_rn(x); }

// N neighbouring elements, moved by one instruction where they fill 16 bytes.
template <class T, int N>
struct alignas(N * sizeof(T)) Pack {
  T values[N];
  __device__ float operator[](int i) const { return to_float(values[i]); }
};

template <class T, int N>
__device__ Pack<T, N> load(const T* from) {
  return *reinterpret_cast<const Pack<T, N>*>(from);
}

template <class T, int N>
__device__ void store(T* to, const float (&values)[N]) {
  Pack<T, N> pack;
#pragma unroll
  for (int i = 0; i < N; ++i) pack.values[i] = from_float<T>(values[i]);
  *reinterpret_cast<Pack<T, N>*>(to) = pack;
}

inline bool aligned16(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace longvita::cuda
