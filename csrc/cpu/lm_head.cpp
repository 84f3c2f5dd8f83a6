#include "lm_head.h"

#include <cstring>

#include "gemm/gemm.h"

namespace longvita::LV_ISA {
namespace {

// A few rows (decoding): bound by reading the weight once, so nothing is packed.
void forward_thin(const LmHeadArgs& p) {
  const int64_t lda = (p.width + 15) / 16 * 16;
  for (int64_t m = 0; m < p.rows; ++m) {
    float* row = p.gathered + m * lda;
    const float* values = widen_row(p.hidden, p.dtype, p.index[m] * p.hidden_stride, p.width, row);
    if (values != row) std::memcpy(row, values, size_t(p.width) * 4);
    std::memset(row + p.width, 0, size_t(lda - p.width) * 4);
  }
  constexpr int64_t kColumns = 256;
  parallel_steps((p.vocab + kColumns - 1) / kColumns, p.threads, p.rows * p.vocab * p.width > kWorthThreads, [&](int64_t piece) {
    const int64_t n0 = piece * kColumns;
    const int64_t count = p.vocab - n0 < kColumns ? p.vocab - n0 : kColumns;
    float logits[kThinRows * kColumns];
    thin_product(p.gathered, lda, p.rows, p.weight, p.dtype, p.weight_stride, n0, count, p.width, logits, kColumns);
    for (int64_t m = 0; m < p.rows; ++m) narrow_row(logits + m * kColumns, count, p.out, p.dtype, m * p.vocab + n0);
  });
}

void forward(const LmHeadArgs& p) {
  if (p.rows <= kThinRows) return forward_thin(p);
  const Matrix hidden(p.hidden, p.dtype, p.hidden_stride, p.index), weight(p.weight, p.dtype, p.weight_stride);
  const Product product = {{hidden, true}, {weight, true}, p.width, p.dtype == DType::bf16, {p.out, p.dtype, p.vocab}};
  for_each_tile(product, TileGrid(p.rows, p.vocab, p.threads), p.threads, p.scratch);
}

// A row that was asked for twice gets the sum of both gradients, added in fp32 in the order of the rows and rounded once.
void scatter(const LmHeadArgs& p) {
  for (int64_t t = 0; t < p.tokens; ++t) p.owner[t] = -1;
  for (int64_t m = 0; m < p.rows; ++m) {
    int64_t& owner = p.owner[p.index[m]];
    if (owner < 0) {
      owner = m;
      continue;
    }
    for (int64_t n = 0; n < p.width; ++n) p.grad_rows[owner * p.width + n] += p.grad_rows[m * p.width + n];
  }
  parallel_steps(p.rows, p.threads, p.rows * p.width > kWorthElements, [&](int64_t m) {
    const int64_t row = p.index[m];
    if (p.owner[row] == m) narrow_row(p.grad_rows + m * p.width, p.width, p.grad_hidden, p.dtype, row * p.width);
  });
}

void backward(const LmHeadArgs& p) {
  const bool pairs = p.dtype == DType::bf16;
  const Matrix hidden(p.hidden, p.dtype, p.hidden_stride, p.index), weight(p.weight, p.dtype, p.weight_stride);
  const Matrix grad(p.grad, p.dtype, p.grad_stride);
  if (p.grad_hidden != nullptr) {
    const Product product = {{grad, true}, {weight, false}, p.vocab, pairs, {p.grad_rows, DType::f32, p.width}};
    for_each_tile(product, TileGrid(p.rows, p.width, p.threads), p.threads, p.scratch);
    scatter(p);
  }
  if (p.grad_weight != nullptr) {
    const Product product = {{grad, false}, {hidden, false}, p.rows, pairs, {p.grad_weight, p.dtype, p.width}};
    for_each_tile(product, TileGrid(p.vocab, p.width, p.threads), p.threads, p.scratch);
  }
}

}  // namespace

extern const LmHeadKernels lm_head_kernels = {kScratchFloats, kThinRows, &forward, &backward};

}  // namespace longvita::LV_ISA
