// What a kernel for sm_90a is written against: names for the instructions of Hopper that these kernels use, each with its rules.
//
// A kernel's source is written once. nvcc compiles it with sm90_ptx.cuh, where every name is an instruction in inline PTX. With
// LV_EMULATE a C++ compiler takes emulate/sm90.h instead, where every name is a function of a strict emulator (emulate/machine.h).
// So device code here uses nothing of CUDA but these names; shared and global memory are touched only through them or the copies.
//
// A thread is one of 128 of its warpgroup; a warp computes 16 rows of the 64 of a wgmma:
//   accumulator m64nNk16   d[4·j + 2·h + e] = D[16·warp + lane/4 + 8·h][8·j + 2·(lane%4) + e]          j < N/8, h < 2, e < 2
//   A from registers       a[2·i + h], halves e = A[16·warp + lane/4 + 8·h][8·i + 2·(lane%4) + e]      i < 2, h < 2
// so the accumulator's d[8·s … 8·s + 7], rounded and packed in pairs, are the A registers of k = 16·s … 16·s + 15.
//
// Operand tiles lie in shared memory as the tensor copy writes them with a swizzle of 128 bytes: rows of 64 elements (128 bytes), whose
// 16-byte pieces are permuted by address bits 4–6 ^= bits 7–9; eight rows (1,024 bytes, aligned so) are the unit that repeats.
#pragma once
#include <cstdint>

#include "longvita/dtype.h"

namespace longvita::sm90 {

constexpr int kSwizzleRow = 64;         // elements of 16 bits in a row of a tile

struct Barrier { uint64_t word; };                       // an mbarrier in shared memory
struct alignas(128) TensorMap { uint64_t word[16]; };    // a CUtensorMap; under the emulator emulate::Box
struct alignas(16) Word4 { uint32_t x, y, z, w; };

}  // namespace longvita::sm90

#ifdef LV_EMULATE
#include "emulate/sm90.h"
#else
#include "sm90_ptx.cuh"
#endif

namespace longvita::sm90 {

// Shared-memory matrix descriptors of wgmma (PTX ISA, "Asynchronous Warpgroup Level Matrix Shared Memory Layout"):
//   bits 0–13 start address / 16 · 16–29 leading offset / 16 · 32–45 stride offset / 16 · 49–51 base offset, 0 because units of 1,024
//   bytes are aligned · 62–63 swizzle, 1: 128 bytes
LV_DEVICE uint64_t descriptor(uint32_t address, uint32_t leading, uint32_t stride) {
  return uint64_t((address & 0x3ffff) >> 4) | uint64_t(leading >> 4) << 16 | uint64_t(stride >> 4) << 32 | uint64_t(1) << 62;
}

// 16 of the summed index, which runs along the rows ("K-major"): rows are the M or N index, eight of them every 1,024 bytes. `address`
// may lie 32, 64 or 96 bytes into the tile's first row, for later 16s. The leading offset is not used.
LV_DEVICE uint64_t along_rows(uint32_t address) { return descriptor(address, 16, 1024); }

// 16 of the summed index, which runs across the rows ("MN-major", wgmma transposes): the M or N index is along the rows, 64 of it in one
// tile, the next 64 in the tile `next` bytes further; eight rows of the summed index every 1,024 bytes. `address`: of row 0, 16, 32, …;
// for 32 columns in the second half of a row, 64 bytes into it.
LV_DEVICE uint64_t across_rows(uint32_t address, uint32_t next) { return descriptor(address, next, 1024); }

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

LV_DEVICE int smaller(int a, int b) { return a < b ? a : b; }
LV_DEVICE int larger(int a, int b) { return a > b ? a : b; }
LV_DEVICE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
LV_DEVICE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

LV_DEVICE int lane() { return thread() % 32; }
LV_DEVICE float infinity() { return float_of_bits(0x7f800000u); }

}  // namespace longvita::sm90
