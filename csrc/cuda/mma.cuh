// The product of a warp on tensor cores, 16 × 8 × 16, of sm_80 and later.
#pragma once
#include <cstdint>

#include "launch.cuh"

#ifdef LV_ON_CPU
#include "mma_emulated.h"      // of tests/cuda/
#else
namespace longvita::cuda {

// c (16 × 8) += a (16 × 16) · b (16 × 8), fp32 sums. With g = lane / 4, t = lane % 4, pairs of T in 32 bits:
//   a0: row g, k 2t, 2t + 1 · a1: row g + 8 · a2, a3: the same, k + 8       b0: k 2t, 2t + 1, column g · b1: k + 8
//   c0, c1: row g, columns 2t, 2t + 1 · c2, c3: row g + 8
template <class T>
__device__ void multiply_16x8x16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1);

#define LV_MULTIPLY(T, name)                                                                                                     \
  template <>                                                                                                                    \
  __device__ inline void multiply_16x8x16<T>(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,     \
                                             uint32_t b1) {                                                                      \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." name "." name ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                                         \
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));                                                                 \
  }
LV_MULTIPLY(__nv_bfloat16, "bf16")
LV_MULTIPLY(__half, "f16")
#undef LV_MULTIPLY

}  // namespace longvita::cuda
#endif
