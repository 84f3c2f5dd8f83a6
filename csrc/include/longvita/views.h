// Tensors as the bindings receive them: an address, sizes and strides in elements. 64-bit everywhere.
#pragma once
#include <cstdint>
#include <string>

#include "longvita/dtype.h"
#include "longvita/errors.h"

#ifdef __CUDACC__
#define LV_BOTH __host__ __device__      // for GPU kernels as well
#else
#define LV_BOTH
#endif

namespace longvita {

// An address that came from Tensor.data_ptr(). It may be null only when there is nothing behind it.
template <class T>
T* pointer(uintptr_t address, int64_t elements, const char* name) {
  check(elements >= 0, name, ": negative size");
  check(address != 0 || elements == 0, name, ": null pointer for a tensor that is not empty");
  check(address % alignof(T) == 0, name, ": pointer not aligned to its element type");
  return reinterpret_cast<T*>(address);
}

// (tokens, heads, dim), the last dimension contiguous.
struct Rows3 {
  char* data = nullptr;          // element type given beside it
  int64_t tokens = 0, heads = 0, dim = 0;
  int64_t stride_token = 0, stride_head = 0;
};

inline Rows3 rows3(uintptr_t address, DType dtype, int64_t tokens, int64_t heads, int64_t dim, int64_t stride_token, int64_t stride_head,
                   const char* name) {
  check(tokens >= 0 && heads > 0 && dim > 0, name, ": sizes must be positive");
  check(stride_token >= 0 && stride_head >= 0, name, ": strides must not be negative");
  check(address % dtype_size(dtype) == 0, name, ": pointer not aligned to its element type");
  return {pointer<char>(address, tokens * heads * dim, name), tokens, heads, dim, stride_token, stride_head};
}

}  // namespace longvita
