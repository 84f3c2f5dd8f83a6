// The smallest op: lets the tests see each instruction set's conversions and exponential.
#pragma once
#include <cstdint>

#include "longvita/dtype.h"
#include "longvita/isa.h"

namespace longvita {
struct SelftestKernels {
  int lanes;
  void (*exp2)(const float* x, float* y, int64_t n);                              // y = 2^x
  void (*tanh)(const float* x, float* y, int64_t n);
  void (*round_trip)(const float* x, float* y, int64_t n, DType through);         // y = float(through(x))
};
}  // namespace longvita
LV_DECLARE_KERNELS(SelftestKernels, selftest_kernels)
