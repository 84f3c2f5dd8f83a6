#include "peer_copy.h"

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstring>

#include "succeed.h"

namespace longvita::cuda {
namespace {

cudaEvent_t event_of(uintptr_t event) { return reinterpret_cast<cudaEvent_t>(event); }
cudaStream_t stream_of(uintptr_t stream) { return reinterpret_cast<cudaStream_t>(stream); }

template <class Handle>
std::string text_of(const Handle& handle) {
  static_assert(sizeof(Handle) == kHandleBytes);
  return std::string(reinterpret_cast<const char*>(&handle), sizeof(Handle));
}

template <class Handle>
Handle handle_of(const std::string& text, const char* what) {
  check(int64_t(text.size()) == kHandleBytes, what, ": a handle has ", int64_t(kHandleBytes), " bytes, got ", int64_t(text.size()));
  Handle handle;
  std::memcpy(&handle, text.data(), sizeof handle);
  return handle;
}

// Start of the allocation that an address lies in. The driver knows it; it is asked through the runtime, so that libcuda is not linked.
uintptr_t start_of(uintptr_t address) {
  using Range = CUresult (*)(CUdeviceptr*, size_t*, CUdeviceptr);
  static const Range range = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult state;
#if CUDART_VERSION >= 12050
    succeed(cudaGetDriverEntryPointByVersion("cuMemGetAddressRange", &found, 12000, cudaEnableDefault, &state), "looking for cuMemGetAddressRange");
#else
    succeed(cudaGetDriverEntryPoint("cuMemGetAddressRange", &found, cudaEnableDefault, &state), "looking for cuMemGetAddressRange");
#endif
    if (state != cudaDriverEntryPointSuccess) throw std::runtime_error("the CUDA driver has no cuMemGetAddressRange; a newer driver is needed");
    return reinterpret_cast<Range>(found);
  }();
  CUdeviceptr start = 0;
  size_t bytes = 0;
  const CUresult code = range(&start, &bytes, address);
  if (code != CUDA_SUCCESS) {
    throw std::runtime_error("asking for the allocation of a tensor failed: CUDA driver error " + std::to_string(int(code)) +
                             "; expected an address on a GPU");
  }
  return start;
}

}  // namespace

ExportedMemory memory_export(uintptr_t address) {
  const uintptr_t start = start_of(address);
  cudaIpcMemHandle_t handle;
  succeed(cudaIpcGetMemHandle(&handle, reinterpret_cast<void*>(start)),
          "exporting memory to another process (memory of expandable segments cannot be: PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False)");
  return {text_of(handle), int64_t(address - start)};
}

uintptr_t memory_open(const std::string& handle) {
  void* start = nullptr;
  succeed(cudaIpcOpenMemHandle(&start, handle_of<cudaIpcMemHandle_t>(handle, "memory_open"), cudaIpcMemLazyEnablePeerAccess),
          "opening memory of another process");
  return reinterpret_cast<uintptr_t>(start);
}

void memory_close(uintptr_t start) { succeed(cudaIpcCloseMemHandle(reinterpret_cast<void*>(start)), "closing memory of another process"); }

void memory_copy(uintptr_t target, uintptr_t source, int64_t bytes, uintptr_t stream) {
  check(bytes >= 0, "memory_copy: negative size");
  if (bytes == 0) return;
  check(target != 0 && source != 0, "memory_copy: null pointer");
  // Unified addresses tell the devices: within one this is a copy in memory, between two a peer copy.
  succeed(cudaMemcpyAsync(reinterpret_cast<void*>(target), reinterpret_cast<const void*>(source), size_t(bytes), cudaMemcpyDefault, stream_of(stream)),
          "copying between GPUs");
}

uintptr_t event_create() {
  cudaEvent_t event = nullptr;
  succeed(cudaEventCreateWithFlags(&event, cudaEventDisableTiming | cudaEventInterprocess), "making an event for several processes");
  return reinterpret_cast<uintptr_t>(event);
}

std::string event_export(uintptr_t event) {
  cudaIpcEventHandle_t handle;
  succeed(cudaIpcGetEventHandle(&handle, event_of(event)), "exporting an event to another process");
  return text_of(handle);
}

uintptr_t event_open(const std::string& handle) {
  cudaEvent_t event = nullptr;
  succeed(cudaIpcOpenEventHandle(&event, handle_of<cudaIpcEventHandle_t>(handle, "event_open")), "opening an event of another process");
  return reinterpret_cast<uintptr_t>(event);
}

void event_destroy(uintptr_t event) { succeed(cudaEventDestroy(event_of(event)), "destroying an event"); }
void event_record(uintptr_t event, uintptr_t stream) { succeed(cudaEventRecord(event_of(event), stream_of(stream)), "recording an event"); }
void event_wait(uintptr_t event, uintptr_t stream) { succeed(cudaStreamWaitEvent(stream_of(stream), event_of(event), 0), "waiting for an event"); }

uintptr_t stream_create() {
  cudaStream_t stream = nullptr;
  succeed(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "making a stream");
  return reinterpret_cast<uintptr_t>(stream);
}

void stream_destroy(uintptr_t stream) { succeed(cudaStreamDestroy(stream_of(stream)), "destroying a stream"); }

}  // namespace longvita::cuda
