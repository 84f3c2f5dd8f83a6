// The machine's own ceilings, for benchmarks: what no kernel of this instruction set can exceed.
#pragma once
#include <cstdint>

#include "longvita/isa.h"

namespace longvita {
struct MachineKernels {
  // `rounds` times kChains independent multiply-adds on registers per thread; pairs: of bf16 pairs. → floating-point operations done.
  int64_t (*multiply_add)(int64_t rounds, bool pairs, int threads, float* sink);
  // Reads `bytes` (a multiple of 64 × threads) once, each thread its own stretch.
  void (*read)(const char* data, int64_t bytes, int threads, int32_t* sink);
};
}  // namespace longvita
LV_DECLARE_KERNELS(MachineKernels, machine_kernels)
