// Errors of the CUDA runtime. std::runtime_error becomes RuntimeError.
#pragma once
#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

#include "longvita/errors.h"

namespace longvita::cuda {

inline void succeed(cudaError_t code, const char* what) {
  if (code == cudaSuccess) return;
  cudaGetLastError();      // or the next call would report it again
  throw std::runtime_error(std::string(what) + " failed: " + cudaGetErrorString(code) + " (" + cudaGetErrorName(code) + ")");
}

}  // namespace longvita::cuda
