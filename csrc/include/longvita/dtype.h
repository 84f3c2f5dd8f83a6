// Element types. The codes are those of longvita_kernels/native.py.
#pragma once
#include <cstddef>
#include <cstdint>

namespace longvita {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2, i8 = 3, f8e4m3 = 4, i32 = 5, i64 = 6 };

struct bf16_t { uint16_t bits; };
struct f16_t { uint16_t bits; };

inline size_t dtype_size(DType t) {
  switch (t) {
    case DType::i64: return 8;
    case DType::f32:
    case DType::i32: return 4;
    case DType::bf16:
    case DType::f16: return 2;
    default: return 1;
  }
}

}  // namespace longvita
