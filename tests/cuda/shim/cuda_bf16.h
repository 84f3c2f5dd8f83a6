#pragma once
#include "cuda_runtime.h"

struct __nv_bfloat16 { uint16_t bits; };
inline float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float(unsigned(x.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  if (std::isnan(x)) return {0x7fff};
  unsigned bits;
  std::memcpy(&bits, &x, 4);
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
