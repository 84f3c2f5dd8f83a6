// Copies between GPUs, and between processes that share memory of a GPU: handles of memory and events that another process can open.
// Nothing here waits for a device; what failed is said in words (std::runtime_error). Errors are those of the current device.
#pragma once
#include <cstdint>
#include <string>

namespace longvita::cuda {

// A piece of device memory in words that another process on this machine can use: memory_open() of the first kHandleBytes maps the whole
// allocation that it lies in; `offset` says where in it.
struct ExportedMemory {
  std::string handle;
  int64_t offset = 0;
};

constexpr int kHandleBytes = 64;

ExportedMemory memory_export(uintptr_t address);
uintptr_t memory_open(const std::string& handle);      // start of the allocation; one that this process has open already is opened again
void memory_close(uintptr_t start);
void memory_copy(uintptr_t target, uintptr_t source, int64_t bytes, uintptr_t stream);      // any two devices, or one

uintptr_t event_create();      // without timing, for several processes
std::string event_export(uintptr_t event);
uintptr_t event_open(const std::string& handle);
void event_destroy(uintptr_t event);
void event_record(uintptr_t event, uintptr_t stream);
void event_wait(uintptr_t event, uintptr_t stream);      // what comes on the stream waits; a process may wait for another's record only once told of it

uintptr_t stream_create();     // one that waits for no other
void stream_destroy(uintptr_t stream);

}  // namespace longvita::cuda
