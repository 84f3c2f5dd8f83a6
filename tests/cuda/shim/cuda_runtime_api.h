// As much of the CUDA runtime as csrc/cuda/ calls, on CPU memory: a stream is done at once, an event is nothing, memory of another process
// is read by process_vm_readv. Only for tests.
#pragma once
#include <sys/prctl.h>
#include <sys/uio.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#define CUDART_VERSION 13000

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidResourceHandle = 400 };
inline const char* cudaGetErrorName(cudaError_t code) { return code == cudaErrorInvalidValue ? "cudaErrorInvalidValue" : "cudaErrorInvalidResourceHandle"; }
inline const char* cudaGetErrorString(cudaError_t code) { return code == cudaErrorInvalidValue ? "invalid argument" : "invalid resource handle"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

using cudaStream_t = struct CUstream_st*;
using cudaEvent_t = struct CUevent_st*;

enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin, cudaDevAttrMultiProcessorCount };
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  *value = which == cudaDevAttrMultiProcessorCount ? 2 : 227 << 10;      // two multiprocessors: persistent blocks come round
  return cudaSuccess;
}

// ------------------------------------------------------------------------------------------------------------------- several processes

enum { cudaIpcMemLazyEnablePeerAccess = 1, cudaEventDisableTiming = 2, cudaEventInterprocess = 4, cudaStreamNonBlocking = 1, cudaEnableDefault = 0 };
enum cudaMemcpyKind { cudaMemcpyDefault };
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess };
struct cudaIpcMemHandle_t { int64_t process; uint64_t start; char rest[48]; };
struct cudaIpcEventHandle_t { int64_t process; uint64_t number; char rest[48]; };

// Memory of another process has addresses with its number in `opened` + 1 in the highest 16 bits.
struct Opened { int64_t process; uint64_t start; };
inline std::vector<Opened> opened;
inline uint64_t events_made = 0;

inline int address_range(unsigned long long* start, size_t* bytes, unsigned long long address) {
  *start = address & ~0xfffull;
  *bytes = 1 << 20;
  return address == 0;
}
inline cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** found, unsigned, unsigned long long, cudaDriverEntryPointQueryResult* state) {
  *found = reinterpret_cast<void*>(&address_range), *state = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
inline cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t* handle, void* start) {
  prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY);      // where only a parent may read a process
  std::memset(handle, 0, sizeof *handle);
  handle->process = getpid(), handle->start = reinterpret_cast<uint64_t>(start);
  return cudaSuccess;
}
inline cudaError_t cudaIpcOpenMemHandle(void** start, cudaIpcMemHandle_t handle, int) {
  if (handle.process == getpid()) return cudaErrorInvalidValue;      // as CUDA says of a process's own handle
  opened.push_back({handle.process, handle.start});
  *start = reinterpret_cast<void*>(uint64_t(opened.size()) << 48);
  return cudaSuccess;
}
inline cudaError_t cudaIpcCloseMemHandle(void*) { return cudaSuccess; }
inline cudaError_t cudaMemcpyAsync(void* target, const void* source, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  const uint64_t number = reinterpret_cast<uint64_t>(source) >> 48, offset = reinterpret_cast<uint64_t>(source) & 0xffffffffffffull;
  if (number == 0) return std::memcpy(target, source, bytes), cudaSuccess;
  const Opened& other = opened.at(number - 1);
  iovec mine = {target, bytes}, theirs = {reinterpret_cast<void*>(other.start + offset), bytes};
  return process_vm_readv(pid_t(other.process), &mine, 1, &theirs, 1, 0) == ssize_t(bytes) ? cudaSuccess : cudaErrorInvalidResourceHandle;
}
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, int) { return *event = reinterpret_cast<cudaEvent_t>(++events_made), cudaSuccess; }
inline cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) { return event ? cudaSuccess : cudaErrorInvalidResourceHandle; }
inline cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t event, int) { return event ? cudaSuccess : cudaErrorInvalidResourceHandle; }
inline cudaError_t cudaIpcGetEventHandle(cudaIpcEventHandle_t* handle, cudaEvent_t event) {
  std::memset(handle, 0, sizeof *handle);
  handle->process = getpid(), handle->number = reinterpret_cast<uint64_t>(event);
  return cudaSuccess;
}
inline cudaError_t cudaIpcOpenEventHandle(cudaEvent_t* event, cudaIpcEventHandle_t handle) {
  if (handle.process == getpid()) return cudaErrorInvalidResourceHandle;
  return *event = reinterpret_cast<cudaEvent_t>(handle.number), cudaSuccess;
}
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, int) { return *stream = reinterpret_cast<cudaStream_t>(1), cudaSuccess; }
inline cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
