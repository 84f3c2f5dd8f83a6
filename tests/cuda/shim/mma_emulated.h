// multiply_16x8x16 of csrc/cuda/mma.cuh, written from the layout that its comment gives.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace longvita::cuda {

struct Fragments { uint32_t a[4], b[2]; };

template <class T>
float element(uint32_t pair, int which) {
  T value;
  const uint16_t bits = uint16_t(pair >> 16 * which);
  std::memcpy(&value, &bits, 2);
  if constexpr (sizeof(__half) == 2 && std::is_same_v<T, __half>) return __half2float(value);
  else return __bfloat162float(value);
}

template <class T>
void multiply_16x8x16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  const auto given = emulated::give(Fragments{{a0, a1, a2, a3}, {b0, b1}});
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  for (int i = 0; i < 4; ++i) {
    const int upper = i / 2, column = 2 * t + i % 2;      // row g or g + 8
    for (int k = 0; k < 16; ++k) {
      const Fragments of_a = given[4 * g + k % 8 / 2], of_b = given[4 * column + k % 8 / 2];
      c[i] += element<T>(of_a.a[upper + 2 * (k / 8)], k % 2) * element<T>(of_b.b[k / 8], k % 2);
    }
  }
}

}  // namespace longvita::cuda
