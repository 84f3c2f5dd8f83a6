#include "cross_entropy.h"

#include <cstring>

#include "gemm/gemm.h"

namespace longvita::LV_ISA {
namespace {

// The part of the logits that exists: rows of the M, columns of the V.
struct Part {
  int64_t first, rows, column, columns;
};

LV_INLINE vf softcapped(vf x, float cap) { return vtanh(x * (1.0f / cap)) * cap; }

void softcap_row(float* row, int64_t count, float cap) {
  for (int64_t i = 0; i < count; i += W) {
    const int lanes = int(count - i < W ? count - i : W);
    store_n(row + i, softcapped(load_n(row + i, lanes), cap), lanes);
  }
}

// Largest value, Σ exp(x - largest) and Σ x of one row of a tile; applies the cap to the row first.
struct RowStatistics {
  float max, exp_sum, sum;
};
RowStatistics row_statistics(float* row, int64_t count, float cap) {
  if (cap > 0.0f) softcap_row(row, count, cap);
  vf max = splat(-kInf), sum = vf{}, exp_sum = vf{};
  for (int64_t i = 0; i < count; i += W) {
    const int lanes = int(count - i < W ? count - i : W);
    vf x = load_n(row + i, lanes);
    sum += x;
    if (lanes < W) x = select(iota() < lanes, x, splat(-kInf));
    max = vmax(x, max);
  }
  const float largest = hmax(max);
  for (int64_t i = 0; i < count; i += W) {
    const int lanes = int(count - i < W ? count - i : W);
    vf e = vexp2((load_n(row + i, lanes) - largest) * kLog2e);
    if (lanes < W) e = select(iota() < lanes, e, vf{});
    exp_sum += e;
  }
  return {largest, hsum(exp_sum), hsum(sum)};
}

LV_INLINE vf natural_log(vf x) {
  vf out;
  for (int i = 0; i < W; ++i) out[i] = __builtin_logf(x[i]);
  return out;
}

Matrix hidden_of(const CrossEntropyArgs& p, const Part& part) { return {p.hidden, p.dtype, p.hidden_stride, p.index + part.first}; }

Matrix weight_of(const CrossEntropyArgs& p, const Part& part) {
  const char* from = static_cast<const char*>(p.weight) + part.column * p.weight_stride * int64_t(dtype_size(p.dtype));
  return {from, p.dtype, p.weight_stride};
}

// Logits of a part, tile by tile: what the loss needs of each block of columns and, if `keep`, the logits themselves for the gradients.
void logits_of(const CrossEntropyArgs& p, const Part& part, bool keep) {
  const Matrix hidden = hidden_of(p, part), weight = weight_of(p, part);
  const int64_t blocks = (p.vocab + kTileN - 1) / kTileN, plane = blocks * p.chunk;
  Product product = {{hidden, true}, {weight, true}, p.width, p.dtype == DType::bf16};
  if (keep) product.out = p.logits, product.stride = part.columns;
  // Blocks of columns keep their width whatever the number of threads: the sums over them are part of the result.
  const TileGrid grid(part.rows, part.columns, p.threads, p.recompute ? 0 : kTileN);
  for_each_tile(product, grid, p.threads, p.scratch, [&](const Tile& tile, float* c, int64_t stride) {
    if (p.recompute && p.softcap == 0.0f) return;
    for (int64_t i = 0; i < tile.mt; ++i) {
      float* row = c + i * stride;
      const int64_t m = tile.m0 + i, label = p.labels[part.first + m] - tile.n0;
      if (p.recompute) {
        softcap_row(row, tile.nt, p.softcap);
        continue;
      }
      const RowStatistics found = row_statistics(row, tile.nt, p.softcap);
      float* at = p.partial + tile.n0 / kTileN * p.chunk + m;
      at[0] = found.max, at[plane] = found.exp_sum, at[2 * plane] = found.sum;
      if (label >= 0 && label < tile.nt) p.statistics[p.rows + part.first + m] = row[label];
    }
  });
}

// Joins the blocks of columns, always in their order; lanes are rows.
void join_blocks(const CrossEntropyArgs& p, const Part& part) {
  const int64_t blocks = (p.vocab + kTileN - 1) / kTileN, plane = blocks * p.chunk;
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t m = 0; m < part.rows; m += W) {
    const int lanes = int(part.rows - m < W ? part.rows - m : W);
    vf max = splat(-kInf), exp_sum = vf{}, sum = vf{};
    for (int64_t block = 0; block < blocks; ++block) max = vmax(load_n(p.partial + block * p.chunk + m, lanes), max);
    for (int64_t block = 0; block < blocks; ++block) {
      const float* at = p.partial + block * p.chunk + m;
      exp_sum += load_n(at + plane, lanes) * vexp2((load_n(at, lanes) - max) * kLog2e);
      sum += load_n(at + 2 * plane, lanes);
    }
    float* out = p.statistics + part.first + m;
    store_n(out, max + natural_log(exp_sum), lanes);
    store_n(out + 2 * p.rows, sum, lanes);
    store_n(out + 3 * p.rows, max, lanes);
    store_n(out + 4 * p.rows, exp_sum, lanes);
  }
}

// Coefficients of the summed loss that is described in cross_entropy.h.
void loss_coefficients(const CrossEntropyArgs& p, const Part& part) {
  for (int64_t m = part.first; m < part.first + part.rows; ++m) {
    const float weight = p.row_weight ? p.row_weight[m] : 1.0f;
    p.coefficients[m] = weight * (1.0f + 2.0f * p.z_loss * p.statistics[m]);
    p.coefficients[p.rows + m] = weight * (p.smoothing - 1.0f);
    p.coefficients[2 * p.rows + m] = -weight * p.smoothing / float(p.vocab);
  }
}

// One row of logits into its gradient, in place; as T, whose first elements take the room of the first logits.
template <class T>
void differentiate_row(const CrossEntropyArgs& p, const Part& part, int64_t m, float* logits, T* out) {
  const int64_t row = part.first + m, label = p.labels[row] - part.column;
  const float a = p.coefficients[row], b = p.coefficients[p.rows + row], c = p.coefficients[2 * p.rows + row];
  const float max = p.statistics[3 * p.rows + row], scale = a / p.statistics[4 * p.rows + row];
  const float inverse_cap = p.softcap > 0.0f ? 1.0f / p.softcap : 0.0f;
  const auto gradient = [&](vf x, float at_label) {
    const vf grad = vexp2((x - max) * kLog2e) * scale + c + at_label, t = x * inverse_cap;
    return grad * (1.0f - t * t);
  };
  const bool labelled = label >= 0 && label < part.columns;
  const float label_gradient = labelled ? gradient(splat(logits[label]), b)[0] : 0.0f;
  for (int64_t v = 0; v < part.columns; v += W) {
    const int lanes = int(part.columns - v < W ? part.columns - v : W);
    store_n(out + v, gradient(load_n(logits + v, lanes), 0.0f), lanes);
  }
  if (labelled) store_n(out + label, splat(label_gradient), 1);
}

// The gradients of a part's logits, where the logits were. Products of pairs round them to bf16, so they are kept as that: half the bytes.
Matrix differentiate(const CrossEntropyArgs& p, const Part& part) {
  const bool pairs = kBf16Pairs && p.dtype == DType::bf16;
#pragma omp parallel for num_threads(p.threads) schedule(static)
  for (int64_t m = 0; m < part.rows; ++m) {
    float* logits = p.logits + m * part.columns;
    if (pairs) differentiate_row(p, part, m, logits, reinterpret_cast<bf16_t*>(logits));
    else differentiate_row(p, part, m, logits, logits);
  }
  return pairs ? Matrix(p.logits, DType::bf16, 2 * part.columns) : Matrix(p.logits, DType::f32, part.columns);
}

void gradients(const CrossEntropyArgs& p, const Part& part) {
  const bool pairs = p.dtype == DType::bf16;
  const Matrix hidden = hidden_of(p, part), weight = weight_of(p, part), grad = differentiate(p, part);
  if (p.grad_hidden != nullptr) {
    const Product product = {{grad, true}, {weight, false}, part.columns, pairs, p.grad_hidden + part.first * p.width, p.width, part.column > 0};
    for_each_tile(product, TileGrid(part.rows, p.width, p.threads), p.threads, p.scratch, kNoEpilogue);
  }
  if (p.grad_weight == nullptr) return;
  Product product = {{grad, false}, {hidden, false}, part.rows, pairs};
  const TileGrid grid(part.columns, p.width, p.threads);
  if (p.recompute) {      // of all rows: finished
    char* out = static_cast<char*>(p.grad_weight) + part.column * p.width * int64_t(dtype_size(p.dtype));
    for_each_tile(product, grid, p.threads, p.scratch, [&](const Tile& tile, const float* c, int64_t stride) {
      narrow_tile(tile, c, stride, out, p.dtype, p.width);
    });
  } else {
    product.out = static_cast<float*>(p.grad_weight), product.stride = p.width, product.add = part.first > 0;
    for_each_tile(product, grid, p.threads, p.scratch, kNoEpilogue);
  }
}

void run(const CrossEntropyArgs& p) {
  const bool needs_gradients = p.grad_hidden != nullptr || p.grad_weight != nullptr;
  if (p.rows == 0 && p.grad_weight != nullptr) {
    std::memset(p.grad_weight, 0, size_t(p.vocab * p.width) * (p.recompute ? dtype_size(p.dtype) : 4));
  }
  if (p.recompute) {
    for (int64_t column = 0; column < p.vocab && p.rows > 0; column += p.chunk) {
      const Part part = {0, p.rows, column, p.vocab - column < p.chunk ? p.vocab - column : p.chunk};
      logits_of(p, part, true);
      gradients(p, part);
    }
    return;
  }
  std::memset(p.statistics + p.rows, 0, size_t(p.rows) * 4);      // a label held elsewhere leaves its target at 0
  for (int64_t first = 0; first < p.rows; first += p.chunk) {
    const Part part = {first, p.rows - first < p.chunk ? p.rows - first : p.chunk, 0, p.vocab};
    logits_of(p, part, needs_gradients);
    join_blocks(p, part);
    if (!needs_gradients) continue;
    loss_coefficients(p, part);
    gradients(p, part);
  }
}

}  // namespace

extern const CrossEntropyKernels cross_entropy_kernels = {kTileN, &run};

}  // namespace longvita::LV_ISA
