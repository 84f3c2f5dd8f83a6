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

// Largest value, Σ exp(x - largest) and Σ x of one row of a tile; leaves exp(x - largest) in its place.
struct RowStatistics {
  float max, exp_sum, sum;
};
RowStatistics row_statistics(float* row, int64_t count) {
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
    store_n(row + i, e, lanes);
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

// What is kept of a part's logits. Products of pairs round gradients to bf16, and a rounded exp(l - largest) is worth as much as a rounded
// gradient; in half the bytes twice as many rows are a part, and a part reads the weight twice and its gradient once.
// A softcap needs the logits again to differentiate it, unless the gradients can be made at once (recompute).
bool keeps_bf16(DType dtype, float softcap, bool recompute) { return kBf16Pairs && dtype == DType::bf16 && (recompute || softcap == 0.0f); }

// d loss / d logit of one row of the part.
struct RowGradient {
  float max, scale, b, c, inverse_cap;
  int64_t label;                      // column of the part; outside it if the label lies elsewhere
  RowGradient(const CrossEntropyArgs& p, const Part& part, int64_t m)
      : max(p.statistics[3 * p.rows + part.first + m]),
        scale(p.coefficients[part.first + m] / p.statistics[4 * p.rows + part.first + m]),
        b(p.coefficients[p.rows + part.first + m]),
        c(p.coefficients[2 * p.rows + part.first + m]),
        inverse_cap(p.softcap > 0.0f ? 1.0f / p.softcap : 0.0f),
        label(p.labels[part.first + m] - part.column) {}

  __attribute__((always_inline)) vf operator()(vf x, float at_label) const {
    const vf t = x * inverse_cap;
    return (vexp2((x - max) * kLog2e) * scale + c + at_label) * (1.0f - t * t);
  }
  // Of the logits in columns n0 … n0+count, to out, which may be where they are.
  template <class T>
  void row(const float* logits, int64_t n0, int64_t count, T* out) const {
    const int64_t at = label - n0;
    const bool labelled = at >= 0 && at < count;
    const vf label_gradient = labelled ? (*this)(splat(logits[at]), b) : vf{};
    for (int64_t n = 0; n < count; n += W) {
      const int lanes = int(count - n < W ? count - n : W);
      store_n(out + n, (*this)(load_n(logits + n, lanes), 0.0f), lanes);
    }
    if (labelled) store_n(out + at, label_gradient, 1);
  }
};

// Logits of a part, tile by tile: what the loss needs of each block of columns and, if `keep`, what the gradients need.
void logits_of(const CrossEntropyArgs& p, const Part& part, bool keep) {
  const Matrix hidden = hidden_of(p, part), weight = weight_of(p, part);
  const int64_t blocks = (p.vocab + kTileN - 1) / kTileN, plane = blocks * p.chunk;
  const bool recompute = p.way == GradientWay::recompute, bf16 = keeps_bf16(p.dtype, p.softcap, recompute);
  const Product product = {{hidden, true}, {weight, true}, p.width, p.dtype == DType::bf16};
  // Blocks of columns keep their width whatever the number of threads: the sums over them are part of the result.
  const TileGrid grid(part.rows, part.columns, p.threads, recompute ? 0 : kTileN);
  for_each_tile(product, grid, p.threads, p.scratch, [&](const Tile& tile, float* c, int64_t stride) {
    for (int64_t i = 0; i < tile.mt; ++i) {
      float* row = c + i * stride;
      const int64_t m = tile.m0 + i, label = p.labels[part.first + m] - tile.n0, at = m * part.columns + tile.n0;
      if (p.softcap > 0.0f) softcap_row(row, tile.nt, p.softcap);
      if (recompute) {
        const RowGradient gradient(p, part, m);
        if (bf16) gradient.row(row, tile.n0, tile.nt, static_cast<bf16_t*>(p.logits) + at);
        else gradient.row(row, tile.n0, tile.nt, static_cast<float*>(p.logits) + at);
        continue;
      }
      if (label >= 0 && label < tile.nt) p.statistics[p.rows + part.first + m] = row[label];
      if (keep && !bf16) std::memcpy(static_cast<float*>(p.logits) + at, row, size_t(tile.nt) * 4);
      const RowStatistics found = row_statistics(row, tile.nt);
      if (keep && bf16) narrow_row(row, tile.nt, p.logits, DType::bf16, at);
      float* out = p.partial + tile.n0 / kTileN * p.chunk + m;
      out[0] = found.max, out[plane] = found.exp_sum, out[2 * plane] = found.sum;
    }
  });
}

// Joins the blocks of columns, always in their order; lanes are rows.
void join_blocks(const CrossEntropyArgs& p, const Part& part) {
  const int64_t blocks = (p.vocab + kTileN - 1) / kTileN, plane = blocks * p.chunk;
  constexpr int64_t kOperations = 16;      // an exponential and a few sums for each row of a block
  parallel_steps((part.rows + W - 1) / W, p.threads, part.rows * blocks * kOperations > kWorthElements, [&](int64_t piece) {
    const int64_t m = piece * W;
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
  });
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

// What was kept of the part's logits into their gradients, in place.
void differentiate(const CrossEntropyArgs& p, const Part& part) {
  const bool bf16 = keeps_bf16(p.dtype, p.softcap, false);
  parallel_steps(part.rows, p.threads, part.rows * part.columns > kWorthElements, [&](int64_t m) {
    const RowGradient gradient(p, part, m);
    if (!bf16) {
      float* logits = static_cast<float*>(p.logits) + m * part.columns;
      gradient.row(logits, 0, part.columns, logits);
      return;
    }
    bf16_t* row = static_cast<bf16_t*>(p.logits) + m * part.columns;
    for (int64_t n0 = 0; n0 < part.columns; n0 += kTileN) {      // exp(l - largest of this block of columns)
      const vf factor = vexp2(splat((p.partial[n0 / kTileN * p.chunk + m] - gradient.max) * kLog2e)) * gradient.scale;
      const int64_t end = part.columns - n0 < kTileN ? part.columns : n0 + kTileN;
      for (int64_t n = n0; n < end; n += W) {
        const int lanes = int(end - n < W ? end - n : W);
        store_n(row + n, load_n(row + n, lanes) * factor + gradient.c, lanes);
      }
    }
    const bool labelled = gradient.label >= 0 && gradient.label < part.columns;
    if (labelled) store_n(row + gradient.label, gradient(splat(p.statistics[p.rows + part.first + m]), gradient.b), 1);
  });
}

void gradients(const CrossEntropyArgs& p, const Part& part) {
  const bool pairs = p.dtype == DType::bf16, at_once = p.way == GradientWay::at_once;
  const Matrix hidden = hidden_of(p, part), weight = weight_of(p, part);
  const Matrix grad(p.logits, keeps_bf16(p.dtype, p.softcap, p.way == GradientWay::recompute) ? DType::bf16 : DType::f32, part.columns);
  if (p.grad_hidden != nullptr) {
    Product product = {{grad, true}, {weight, false}, part.columns, pairs};
    const TileGrid grid(part.rows, p.width, p.threads);
    if (p.way == GradientWay::finish) {
      for_each_tile(product, grid, p.threads, p.scratch, [&](const Tile& tile, float* c, int64_t stride) {
        for (int64_t i = 0; i < tile.mt; ++i) {
          float* values = c + i * stride;
          for (int64_t n = 0; n < tile.nt; ++n) values[n] *= p.factor;
          narrow_row(values, tile.nt, p.grad_hidden, p.dtype, p.index[tile.m0 + i] * p.width + tile.n0);
        }
      });
    } else {
      product.out = {static_cast<float*>(p.grad_hidden) + part.first * p.width, DType::f32, p.width, 1.0f, part.column > 0};
      for_each_tile(product, grid, p.threads, p.scratch);
    }
  }
  if (p.grad_weight == nullptr) return;
  const DType dtype = at_once ? DType::f32 : p.dtype;
  char* out = static_cast<char*>(p.grad_weight) + part.column * p.width * int64_t(dtype_size(dtype));
  const Product product = {{grad, false}, {hidden, false}, part.rows, pairs, {out, dtype, p.width, p.factor, part.first > 0}};
  for_each_tile(product, TileGrid(part.columns, p.width, p.threads), p.threads, p.scratch);
}

void run(const CrossEntropyArgs& p) {
  if (p.rows == 0 && p.grad_weight != nullptr) {
    std::memset(p.grad_weight, 0, size_t(p.vocab * p.width) * (p.way == GradientWay::at_once ? 4 : dtype_size(p.dtype)));
  }
  if (p.way == GradientWay::finish) {
    if (p.rows > 0) gradients(p, {0, p.rows, 0, p.vocab});
    return;
  }
  if (p.way == GradientWay::recompute) {
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
    logits_of(p, part, p.logits != nullptr);
    join_blocks(p, part);
    if (p.logits == nullptr) continue;
    loss_coefficients(p, part);
    differentiate(p, part);
    if (p.way == GradientWay::at_once) gradients(p, part);
  }
}

// All threads, because the result is new memory: its first touch costs the system more than the product.
void scale(const float* values, int64_t count, float factor, DType dtype, void* out, int threads) {
  constexpr int64_t kPiece = 2048;
  parallel_steps((count + kPiece - 1) / kPiece, threads, count > kWorthThreads, [&](int64_t piece) {
    const int64_t from = piece * kPiece;
    float buffer[kPiece];
    const int64_t size = count - from < kPiece ? count - from : kPiece;
    for (int64_t i = 0; i < size; ++i) buffer[i] = values[from + i] * factor;
    narrow_row(buffer, size, out, dtype, from);
  });
}

}  // namespace

extern const CrossEntropyKernels cross_entropy_kernels = {kTileN, &keeps_bf16, &run, &scale};

}  // namespace longvita::LV_ISA
