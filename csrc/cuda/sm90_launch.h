// The host's side: maps for the tensor copy, launches. With LV_EMULATE the emulator takes the place of the driver.
#pragma once
#include <cstring>
#include <stdexcept>
#include <string>

#include "longvita/dtype.h"
#include "longvita/errors.h"
#include "longvita/views.h"
#include "sm90.cuh"

#ifndef LV_EMULATE
#include <cuda.h>
#include <cuda_runtime.h>

#include <sstream>

#include "succeed.h"
#endif

namespace longvita::sm90 {

constexpr int64_t kLimitStride = int64_t(1) << 40;      // bytes; a map's strides lie below

// Why a tensor copy cannot follow (tokens, heads, dim) of 16-bit elements, in words, or "".
inline std::string map_cannot(const Rows3& x, const char* name) {
  const auto follows = [](int64_t stride) { return stride > 0 && stride * 2 % 16 == 0 && stride * 2 < kLimitStride; };
  if (reinterpret_cast<uintptr_t>(x.data) % 16 != 0) return std::string(name) + " does not begin at a multiple of 16 bytes";
  if (x.heads > 1 && !follows(x.stride_head)) return std::string(name) + "'s heads are not multiples of 16 bytes apart";
  if (x.tokens > 1 && !follows(x.stride_token)) return std::string(name) + "'s tokens are not multiples of 16 bytes apart";
  return "";
}

// Strides as the driver takes them: of a dimension of one element any will do.
inline uint64_t map_stride(int64_t size, int64_t stride, int64_t dim) { return uint64_t(size > 1 ? stride : dim) * 2; }

#ifdef LV_EMULATE

inline int multiprocessors() { return longvita::emulate::settings.multiprocessors; }
inline std::string device_cannot() { return ""; }

inline TensorMap tensor_map(const Rows3& x, DType, int rows, int columns) {
  const emulate::Box box{x.data,
                         {uint64_t(x.dim), uint64_t(x.heads), uint64_t(x.tokens)},
                         {map_stride(x.heads, x.stride_head, x.dim), map_stride(x.tokens, x.stride_token, x.dim)},
                         uint32_t(rows), uint32_t(columns)};
  TensorMap map{};
  memcpy(static_cast<void*>(&map), &box, sizeof(box));
  return map;
}

template <class Kernel, class Parameters>
void launch(Kernel kernel, const Parameters& p, int64_t blocks, int threads, size_t shared_bytes, void*) {
  emulate::launch([&] { kernel(p); }, int(blocks), threads, uint32_t(shared_bytes));
}

#else

using longvita::cuda::succeed;

inline int attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  succeed(cudaGetDevice(&device), "asking for the current device");
  succeed(cudaDeviceGetAttribute(&value, which, device), "asking for an attribute of the device");
  return value;
}
inline int multiprocessors() { return attribute(cudaDevAttrMultiProcessorCount); }

// sm_90a is one architecture: its code runs on nothing older or newer.
inline std::string device_cannot() {
  const int major = attribute(cudaDevAttrComputeCapabilityMajor), minor = attribute(cudaDevAttrComputeCapabilityMinor);
  if (major == 9 && minor == 0) return "";
  return "these kernels are for compute capability 9.0; the device has " + std::to_string(major) + "." + std::to_string(minor);
}

// The driver's function, found at run time, so that nothing links against libcuda.
inline auto encode_function() {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode function = [] {
    const char* name = "cuTensorMapEncodeTiled";
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 12050
    succeed(cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &result), name);
#else
    succeed(cudaGetDriverEntryPoint(name, &found, cudaEnableDefault, &result), name);
#endif
    if (result != cudaDriverEntryPointSuccess || !found) throw std::runtime_error(std::string("the CUDA driver is too old for ") + name);
    return reinterpret_cast<Encode>(found);
  }();
  return function;
}

// The driver's own functions need a context, which a thread has only after the runtime gave it one: autograd's threads come without.
inline void bind_context() {
  int device = 0;
  succeed(cudaGetDevice(&device), "asking for the current device");
  succeed(cudaSetDevice(device), "making the device's context current");
}

// A map of (tokens, heads, dim) whose boxes are `rows` tokens × `columns` elements of one head, swizzled in 128 bytes.
inline TensorMap tensor_map(const Rows3& x, DType dtype, int rows, int columns) {
  static_assert(sizeof(TensorMap) == sizeof(CUtensorMap) && alignof(TensorMap) >= alignof(CUtensorMap));
  const cuuint64_t size[3] = {cuuint64_t(x.dim), cuuint64_t(x.heads), cuuint64_t(x.tokens)};
  const cuuint64_t stride[2] = {map_stride(x.heads, x.stride_head, x.dim), map_stride(x.tokens, x.stride_token, x.dim)};
  const cuuint32_t box[3] = {cuuint32_t(columns), 1, cuuint32_t(rows)}, steps[3] = {1, 1, 1};
  bind_context();
  TensorMap map;
  const auto type = dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const CUresult code = encode_function()(
      reinterpret_cast<CUtensorMap*>(&map), type, 3, x.data, size, stride, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (code != CUDA_SUCCESS) {
    std::ostringstream text;
    text << "cuTensorMapEncodeTiled failed with error " << int(code) << " for " << x.data << ", sizes " << size[0] << " " << size[1] << " "
         << size[2] << ", strides " << stride[0] << " " << stride[1] << " bytes, boxes of " << box[0] << " x " << box[2];
    throw std::runtime_error(text.str());
  }
  return map;
}

template <class Kernel, class Parameters>
void launch(Kernel kernel, const Parameters& p, int64_t blocks, int threads, size_t shared_bytes, void* stream) {
  check(blocks <= 0x7fffffff, "attention: ", blocks, " blocks are more than a grid has");
  succeed(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)), "shared memory of a kernel");
  kernel<<<dim3(unsigned(blocks)), dim3(threads), shared_bytes, cudaStream_t(stream)>>>(p);
  succeed(cudaGetLastError(), "launch of a kernel");
}

#endif

}  // namespace longvita::sm90
