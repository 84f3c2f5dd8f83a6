#pragma once
#include "cuda_runtime.h"

struct __half { _Float16 value; };      // g++ 12 and clang 15 have it
inline float __half2float(__half x) { return float(x.value); }
inline __half __float2half_rn(float x) { return {_Float16(x)}; }
