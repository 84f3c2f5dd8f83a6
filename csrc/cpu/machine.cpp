#include "machine.h"

#include <omp.h>

#include <cstring>

#include "simd.h"

namespace longvita::LV_ISA {
namespace {

constexpr int kChains = 12;      // latency of 4 cycles × 2 units, and some to spare, within 16 registers

template <bool BF16Pairs>
vf chains(int64_t rounds, float start) {
  vf sum[kChains];
  for (int i = 0; i < kChains; ++i) sum[i] = splat(start * float(i));
  // so small a factor that nothing overflows; both come from memory, so that the compiler cannot work the sum out beforehand
  const volatile float factor = 1e-3f;
  const vf a = splat(factor), b = splat(factor);
  for (int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) {
      if constexpr (BF16Pairs) sum[i] = dot_pairs(sum[i], (vu)a, (vu)b);
      else sum[i] = sum[i] * a + b;
    }
  }
  vf total = sum[0];
  for (int i = 1; i < kChains; ++i) total += sum[i];
  return total;
}

int64_t multiply_add(int64_t rounds, bool pairs, int threads, float* sink) {
  pairs = pairs && kBf16Pairs;
#pragma omp parallel num_threads(threads)
  {
    const vf total = pairs ? chains<true>(rounds, 1e-3f) : chains<false>(rounds, 1e-3f);
#pragma omp critical
    sink[0] += hsum(total);
  }
  return rounds * kChains * W * (pairs ? 4 : 2) * threads;
}

void read(const char* data, int64_t bytes, int threads, int32_t* sink) {
  const int64_t stretch = bytes / threads;
#pragma omp parallel num_threads(threads)
  {
    const char* from = data + omp_get_thread_num() * stretch;
    constexpr int kStreams = 4;      // several pages at a time: one page's prefetcher alone leaves the memory waiting
    const int64_t part = stretch / kStreams / 64 * 64;
    vi sum[kStreams] = {};
    for (int64_t at = 0; at < part; at += 64) {
      for (int s = 0; s < kStreams; ++s) {
        for (int i = 0; i < 64; i += int(sizeof(vi))) {
          vi value;
          std::memcpy(&value, from + s * part + at + i, sizeof value);
          sum[s] ^= value;
        }
      }
    }
    vi all = sum[0] ^ sum[1] ^ sum[2] ^ sum[3];
    for (int64_t at = kStreams * part; at < stretch; at += 64) {
      vi value;
      std::memcpy(&value, from + at, sizeof value);
      all ^= value;
    }
#pragma omp critical
    sink[0] ^= all[0];
  }
}

}  // namespace

extern const MachineKernels machine_kernels = {&multiply_add, &read};

}  // namespace longvita::LV_ISA
