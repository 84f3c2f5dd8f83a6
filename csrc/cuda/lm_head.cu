// architectures: sm_80 sm_90a sm_100a
//
// Logits of up to 8 rows: logits[m, v] = Σ_h hidden[rows[m], h] · weight[v, h]. All there is to it is reading the weight once at the speed
// of memory (Qwen2.5-14B: 1.56 GB); tensor cores make the arithmetic of 8 rows cost what that of one costs.
//
// A warp takes 16 rows of the weight. Lane (g, t), g = lane / 4, t = lane % 4, loads 16 bytes of rows g and g + 8, those at t within the
// 64 bytes of a step, kSteps steps at a time: 256 bytes a lane are under way, 8 KiB a warp. bf16 and fp16: as operand A of two products
// 16 × 8 × 16, whose sum may run over k in any order, so that no lane ever needs another's bytes; operand B is the same piece of row g of
// hidden, from shared memory, and column g of the result is its logit. fp32: plain multiply-adds over all rows of hidden, added up over t
// at the end. Either way each logit is one chain of sums in one order, whatever the number of rows.
#include "lm_head.h"

#include "launch.cuh"
#include "mma.cuh"

namespace longvita::cuda {
namespace {

constexpr int kThreads = 256, kVocab = 16, kStepBytes = 64, kBlocks = 2;
constexpr int kSteps = 8;      // 2 where elements are loaded one by one, which takes more registers

template <class T>
constexpr int kChunk = 16 / sizeof(T);      // elements that a lane loads at once

// Elements [at, at + kChunk) of a row, 0 beyond its end.
template <class T, bool kAligned>
__device__ uint4 load_chunk(const T* row, int64_t at, int64_t width) {
  uint4 chunk = {};
  if constexpr (kAligned) {
    if (at < width) chunk = __ldcs(reinterpret_cast<const uint4*>(row + at));
  } else {
    T elements[kChunk<T>];
#pragma unroll
    for (int i = 0; i < kChunk<T>; ++i) elements[i] = at + i < width ? row[at + i] : from_float<T>(0.0f);
    memcpy(&chunk, elements, 16);
  }
  return chunk;
}

// sums[0], [1]: row g of the weight and columns 2t, 2t + 1; sums[2], [3]: row g + 8.
template <class T>
struct Sums {
  float values[4] = {};

  __device__ void add(uint4 low, uint4 high, const unsigned char* hidden, int64_t row_bytes, int rows, int g, int t) {
    const uint4 b = *reinterpret_cast<const uint4*>(hidden + (g < rows ? g : 0) * row_bytes + 16 * t);      // a column beyond: not stored
    multiply_16x8x16<T>(values, low.x, high.x, low.y, high.y, b.x, b.y);
    multiply_16x8x16<T>(values, low.z, high.z, low.w, high.w, b.z, b.w);
  }
  __device__ void finish(int) {}
};

template <>
struct Sums<float> {
  float values[2 * kFewRows] = {};      // [8 · (row g or g + 8) + m] until finish()

  __device__ static float dot(uint4 a, uint4 b, float sum) {
    sum = fmaf(__uint_as_float(a.x), __uint_as_float(b.x), sum);
    sum = fmaf(__uint_as_float(a.y), __uint_as_float(b.y), sum);
    sum = fmaf(__uint_as_float(a.z), __uint_as_float(b.z), sum);
    return fmaf(__uint_as_float(a.w), __uint_as_float(b.w), sum);
  }
  __device__ void add(uint4 low, uint4 high, const unsigned char* hidden, int64_t row_bytes, int rows, int, int t) {
#pragma unroll
    for (int m = 0; m < kFewRows; ++m) {
      if (m >= rows) break;
      const uint4 b = *reinterpret_cast<const uint4*>(hidden + m * row_bytes + 16 * t);
      values[m] = dot(low, b, values[m]), values[kFewRows + m] = dot(high, b, values[kFewRows + m]);
    }
  }
  // Adds up over the four lanes of a row; each keeps half of its columns, then half of those.
  __device__ void finish(int t) {
#pragma unroll
    for (int half = kFewRows / 2; half > 1; half /= 2) {
      const bool upper = t & (half / 2);
#pragma unroll
      for (int row = 0; row < 2; ++row) {
#pragma unroll
        for (int i = 0; i < half; ++i) {
          const float lower_half = values[kFewRows * row + i], upper_half = values[kFewRows * row + half + i];
          values[kFewRows * row + i] = (upper ? upper_half : lower_half) + __shfl_xor_sync(0xffffffffu, upper ? lower_half : upper_half, half / 2);
        }
      }
    }
    values[2] = values[kFewRows], values[3] = values[kFewRows + 1];
  }
};

template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads, kBlocks) few_rows_kernel(const __grid_constant__ FewRowsArgs args, int rows, int64_t row_bytes) {
  const T* hidden = reinterpret_cast<const T*>(args.hidden);
  const T* weight = reinterpret_cast<const T*>(args.weight);
  T* out = reinterpret_cast<T*>(args.out);
  for (int m = 0; m < rows; ++m) {
    const int64_t last = args.tokens - 1, wanted = args.index[m], row = wanted < 0 ? 0 : wanted > last ? last : wanted;
    for (int64_t at = threadIdx.x * kChunk<T>; at * int64_t(sizeof(T)) < row_bytes; at += kThreads * kChunk<T>) {
      const uint4 chunk = load_chunk<T, kAligned>(hidden + row * args.hidden_stride, at, args.width);
      *reinterpret_cast<uint4*>(dynamic_shared + m * row_bytes + at * sizeof(T)) = chunk;
    }
  }
  __syncthreads();

  const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
  const int64_t warps = int64_t(gridDim.x) * (kThreads / kWarp);
  for (int64_t first = (int64_t(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp) * kVocab; first < args.vocab; first += warps * kVocab) {
    const int64_t low = first + g, high = first + g + 8, last = args.vocab - 1;
    const T* low_row = weight + (low < last ? low : last) * args.weight_stride;
    const T* high_row = weight + (high < last ? high : last) * args.weight_stride;
    Sums<T> sums;
    constexpr int steps = kAligned ? kSteps : 2;
    for (int64_t k = 0; k < args.width; k += steps * 4 * kChunk<T>) {
      uint4 low_chunk[steps], high_chunk[steps];
#pragma unroll
      for (int step = 0; step < steps; ++step) {
        const int64_t at = k + (4 * step + t) * kChunk<T>;
        low_chunk[step] = load_chunk<T, kAligned>(low_row, at, args.width);
        high_chunk[step] = load_chunk<T, kAligned>(high_row, at, args.width);
      }
#pragma unroll
      for (int step = 0; step < steps; ++step) {
        sums.add(low_chunk[step], high_chunk[step], dynamic_shared + k * sizeof(T) + step * kStepBytes, row_bytes, rows, g, t);
      }
    }
    sums.finish(t);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t v = i < 2 ? low : high, m = 2 * t + i % 2;
      if (v < args.vocab && m < rows) out[m * args.vocab + v] = from_float<T>(sums.values[i]);
    }
  }
}

}  // namespace

// Rows of hidden lie in shared memory with whole groups of kSteps steps, an odd number of 64 bytes apart: the 8 lanes that are served at a
// time read 64 bytes of two rows, which then lie in all 32 banks.
FewRowsPlan plan_few_rows(DType dtype, int64_t rows, int64_t width, int64_t vocab, int64_t shared_limit, int64_t multiprocessors) {
  const int64_t group = kSteps * kStepBytes, bytes = (width * int64_t(dtype_size(dtype)) + group - 1) / group * group;
  FewRowsPlan plan;
  plan.row_bytes = bytes + kStepBytes;
  const int64_t fit = shared_limit / plan.row_bytes, most = rows < kFewRows ? rows : kFewRows;
  plan.rows = int(fit < most ? fit : most);
  const int64_t tiles = (vocab + kVocab - 1) / kVocab, warps = kThreads / kWarp, needed = (tiles + warps - 1) / warps;
  plan.blocks = needed < kBlocks * multiprocessors ? needed : kBlocks * multiprocessors;
  return plan;
}

void masked_lm_head_few_rows(const FewRowsArgs& args, cudaStream_t stream) {
  if (args.rows == 0 || args.vocab == 0) return;
  check(args.tokens > 0, "masked_lm_head: hidden has no rows");
  const FewRowsPlan plan = plan_few_rows(args.dtype, args.rows, args.width, args.vocab, attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
                                         attribute(cudaDevAttrMultiProcessorCount));
  check(plan.rows > 0, "masked_lm_head: a row of hidden has ", args.width, " elements, more than fit into shared memory");
  by_dtype(args.dtype, [&](auto type) {
    using T = decltype(type);
    const bool aligned = aligned16(args.hidden) && aligned16(args.weight) && args.width % kChunk<T> == 0 &&
                         args.hidden_stride % kChunk<T> == 0 && args.weight_stride % kChunk<T> == 0;
    FewRowsArgs part = args;
    for (int64_t done = 0; done < args.rows; done += plan.rows) {
      const int rows = int(args.rows - done < plan.rows ? args.rows - done : plan.rows);
      part.index = args.index + done;
      part.out = args.out + done * args.vocab * int64_t(sizeof(T));
      const auto kernel = aligned ? few_rows_kernel<T, true> : few_rows_kernel<T, false>;
      launch("masked_lm_head", kernel, plan.blocks, kThreads, size_t(rows * plan.row_bytes), stream, part, rows, plan.row_bytes);
    }
  });
}

}  // namespace longvita::cuda
