#include "projection.h"

#include <cstring>

#include "gemm/gemm.h"

namespace longvita::LV_ISA {
namespace {

constexpr int64_t kBlockRows = 96;      // tokens behind one partial sum of the LayerNorm's gradients

LV_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
LV_INLINE int64_t tokens_of(const ProjectionArgs& p) { return p.tiles * (p.grid_rows / 2) * (p.grid_cols / 2); }

// ---------------------------------------------------------------------------------------------- activation
// erf as an odd rational function on |x| <= 4 (Eigen's coefficients): absolute error about 3e-7.
LV_INLINE vf verf(vf x) {
  x = x > 4.0f ? splat(4.0f) : x;
  x = x < -4.0f ? splat(-4.0f) : x;
  const vf s = x * x;
  vf p = splat(-2.72614225801306e-10f);
  p = p * s + 2.77068142495902e-08f;
  p = p * s + -2.10102402082508e-06f;
  p = p * s + -5.69250639462346e-05f;
  p = p * s + -7.34990630326855e-04f;
  p = p * s + -2.95459980854025e-03f;
  p = p * s + -1.60960333262415e-02f;
  vf q = splat(-1.45660718464996e-05f);
  q = q * s + -2.13374055278905e-04f;
  q = q * s + -1.68282697438203e-03f;
  q = q * s + -7.37332916720468e-03f;
  q = q * s + -1.42647390514189e-02f;
  return x * p / q;
}
LV_INLINE vf normal_cdf(vf z) { return 0.5f + 0.5f * verf(z * 0.70710678f); }
LV_INLINE vf gelu(vf z) { return z * normal_cdf(z); }
LV_INLINE vf gelu_slope(vf z) { return normal_cdf(z) + z * 0.39894228f * vexp2(z * z * (-0.5f * kLog2e)); }

// ---------------------------------------------------------------------------------------------- reading x
// Token r of the shuffled image: column (dr·2 + dc)·C + c is channel c of patch (2i + dr, 2j + dc). Where patches are adjacent in
// memory, two of them make one run.
struct Shuffled {
  const ProjectionArgs& p;
  int64_t run;                       // values in one run: 2C or C
  explicit Shuffled(const ProjectionArgs& p) : p(p), run(p.x_patch == p.channels ? 2 * p.channels : p.channels) {}

  // Element offset of column `col` of token `row`.
  int64_t offset(int64_t row, int64_t col) const { return offset(row, col, p.x_tile, p.x_patch); }
  int64_t gradient_offset(int64_t row, int64_t col) const { return offset(row, col, p.grad_x_tile, p.grad_x_patch); }
  int64_t offset(int64_t row, int64_t col, int64_t tile_stride, int64_t patch_stride) const {
    const int64_t across = p.grid_cols / 2, down = p.grid_rows / 2;
    const int64_t line = row / across, j = row - line * across, tile = line / down, i = line - tile * down;
    const int64_t corner = col / p.channels, patch = (2 * i + corner / 2) * p.grid_cols + 2 * j + corner % 2;
    return tile * tile_stride + patch * patch_stride + (col - corner * p.channels);
  }
  // each(at, take): columns `at` … `at + take` of a token lie side by side.
  template <class Each>
  __attribute__((always_inline)) void runs(int64_t col, int64_t count, const Each& each) const {
    for (int64_t at = col; at < col + count;) {
      const int64_t take = smaller(run - at % run, col + count - at);
      each(at, take);
      at += take;
    }
  }
  const float* read(int64_t row, int64_t col, int64_t count, float* buffer) const {
    for (int64_t done = 0; done < count;) {
      const int64_t at = col + done, within = at % run, take = smaller(run - within, count - done);
      const float* values = widen_row(p.x, p.dtype, offset(row, at), take, buffer + done);
      if (take == count) return values;
      if (values != buffer + done) std::memcpy(buffer + done, values, size_t(take) * 4);
      done += take;
    }
    return buffer;
  }
  // The gradient of x, which need not have its strides: all columns of a token, to `out`; or some of them rounded and written.
  void read_gradient(int64_t row, float* out) const {
    for (int64_t at = 0; at < 4 * p.channels; at += p.channels) {
      const float* values = widen_row(p.grad_x, p.dtype, gradient_offset(row, at), p.channels, out + at);
      if (values != out + at) std::memcpy(out + at, values, size_t(p.channels) * 4);
    }
  }
  void write_gradient(int64_t row, int64_t col, int64_t count, const float* values) const {
    for (int64_t at = col; at < col + count;) {
      const int64_t take = smaller(p.channels - at % p.channels, col + count - at);
      narrow_row(values + at - col, take, p.grad_x, p.dtype, gradient_offset(row, at));
      at += take;
    }
  }
};

// The same after LayerNorm.
struct Normalised final : RowSource {
  Shuffled shuffled;
  explicit Normalised(const ProjectionArgs& p) : shuffled(p) {}
  const void* where(int64_t row, int64_t col) const override {
    return static_cast<const char*>(shuffled.p.x) + shuffled.offset(row, col) * int64_t(dtype_size(shuffled.p.dtype));
  }
  const float* read(int64_t row, int64_t col, int64_t count, float* buffer) const override { return normalise(row, col, count, buffer); }
  const bf16_t* read_bf16(int64_t row, int64_t col, int64_t count, bf16_t* buffer) const override { return normalise(row, col, count, buffer); }

 private:
  template <class T>
  const T* normalise(int64_t row, int64_t col, int64_t count, T* out) const {
    if (shuffled.p.dtype == DType::bf16) return normalise_from<bf16_t>(row, col, count, out);
    if (shuffled.p.dtype == DType::f16) return normalise_from<f16_t>(row, col, count, out);
    return normalise_from<float>(row, col, count, out);
  }
  template <class From, class T>
  const T* normalise_from(int64_t row, int64_t col, int64_t count, T* out) const {
    const ProjectionArgs& p = shuffled.p;
    const float mean = p.stats[row], inverse = p.stats[tokens_of(p) + row];
    shuffled.runs(col, count, [&](int64_t at, int64_t take) {
      const From* values = static_cast<const From*>(p.x) + shuffled.offset(row, at);
      const float *weight = p.ln_weight + at, *bias = p.ln_bias + at;
      T* to = out + (at - col);
      int64_t i = 0;
      for (; i + W <= take; i += W) store(to + i, (load(values + i) - mean) * inverse * load(weight + i) + load(bias + i));
      if (i == take) return;
      const int lanes = int(take - i);
      store_n(to + i, (load_n(values + i, lanes) - mean) * inverse * load_n(weight + i, lanes) + load_n(bias + i, lanes), lanes);
    });
    return out;
  }
};

// Σ f(x) over columns 0 … width of a token, as they lie in memory.
template <class T, class Term>
LV_INLINE float token_sum(const Shuffled& shuffled, int64_t row, int64_t width, const Term& term) {
  vf sums[4] = {};
  shuffled.runs(0, width, [&](int64_t at, int64_t take) {
    const T* values = static_cast<const T*>(shuffled.p.x) + shuffled.offset(row, at);
    int64_t i = 0;
    for (; i + 4 * W <= take; i += 4 * W) {
#pragma GCC unroll 4
      for (int64_t j = 0; j < 4; ++j) sums[j] += term(load(values + i + j * W));
    }
    for (; i < take; i += W) {
      const int lanes = int(smaller(take - i, W));
      sums[0] += select(iota() < lanes, term(load_n(values + i, lanes)), vf{});
    }
  });
  return hsum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// Mean first, then the mean square around it: exact where the mean is large against the spread.
template <class T>
void typed_statistics(const ProjectionArgs& p) {
  const Shuffled shuffled(p);
  const int64_t tokens = tokens_of(p), width = 4 * p.channels;
  parallel_steps(tokens, p.threads, tokens * width > kWorthThreads, [&](int64_t r) {
    const float mean = token_sum<T>(shuffled, r, width, [](vf x) { return x; }) / float(width);
    const float square = token_sum<T>(shuffled, r, width, [mean](vf x) { return (x - mean) * (x - mean); }) / float(width);
    p.stats[r] = mean;
    p.stats[tokens + r] = 1.0f / __builtin_sqrtf(square + p.eps);
  });
}
void statistics(const ProjectionArgs& p) {
  if (p.dtype == DType::bf16) typed_statistics<bf16_t>(p);
  else if (p.dtype == DType::f16) typed_statistics<f16_t>(p);
  else typed_statistics<float>(p);
}

// ---------------------------------------------------------------------------------------------- forward
// A tile of fp32 sums, a row at a time, because a row stays in L1: each(row of the tile, its values), then rounded into `out`, whose rows are
// `apart` elements apart.
template <class Each>
LV_INLINE void finish_rows(const Tile& tile, float* c, int64_t stride, void* out, DType dtype, int64_t apart, const Each& each) {
  for (int64_t i = 0; i < tile.mt; ++i) {
    each(i, c + i * stride);
    narrow_row(c + i * stride, tile.nt, out, dtype, (tile.m0 + i) * apart + tile.n0);
  }
}
LV_INLINE void add_bias(const Tile& tile, float* row, const float* bias) {
  for (int64_t n = 0; n < tile.nt; ++n) row[n] += bias[tile.n0 + n];
}

int64_t act_stride(int64_t hidden, DType dtype) { return in_place_stride(hidden, dtype); }
Matrix act_of(const ProjectionArgs& p) { return {p.act, p.dtype, act_stride(p.hidden, p.dtype)}; }

void forward(const ProjectionArgs& p) {
  const int64_t tokens = tokens_of(p);
  const bool pairs = p.dtype == DType::bf16;
  statistics(p);
  const Normalised normalised(p);
  const Matrix w1(p.w1, p.dtype, p.w1_stride), w2(p.w2, p.dtype, p.w2_stride), act = act_of(p);
  const Product first = {{normalised, true}, {w1, true}, 4 * p.channels, pairs};
  Product second = {{act, true}, {w2, true}, p.hidden, pairs};
  if (p.b2 == nullptr) second.out = {p.y, p.dtype, p.out};
  for_each_tile(first, TileGrid(tokens, p.hidden, p.threads), p.threads, p.scratch, [&](const Tile& tile, float* c, int64_t stride) {
    finish_rows(tile, c, stride, p.act, p.dtype, act.stride, [&](int64_t i, float* row) {
      if (p.b1 != nullptr) add_bias(tile, row, p.b1);
      if (p.z != nullptr) narrow_row(row, tile.nt, p.z, p.dtype, (tile.m0 + i) * p.hidden + tile.n0);
      for (int64_t n = 0; n < tile.nt; n += W) {
        const int lanes = int(smaller(tile.nt - n, W));
        store_n(row + n, gelu(load_n(row + n, lanes)), lanes);
      }
    });
  });
  for_each_tile(second, TileGrid(tokens, p.out, p.threads), p.threads, p.scratch, [&](const Tile& tile, float* c, int64_t stride) {
    if (p.b2 == nullptr) return;
    finish_rows(tile, c, stride, p.y, p.dtype, p.out, [&](int64_t, float* row) { add_bias(tile, row, p.b2); });
  });
}

// ---------------------------------------------------------------------------------------------- backward
// out[n] = Σ_r source[r, n], in two levels so that the error does not grow with the number of rows.
void column_sums(const RowSource& source, int64_t rows, int64_t width, int threads, float* out) {
  constexpr int64_t kColumns = 64;
  parallel_steps((width + kColumns - 1) / kColumns, threads, rows * width > kWorthThreads, [&](int64_t piece) {
    const int64_t n0 = piece * kColumns;
    const int64_t count = smaller(width - n0, kColumns);
    float total[kColumns] = {}, buffer[kColumns];
    for (int64_t r0 = 0; r0 < rows; r0 += 64) {
      float part[kColumns] = {};
      for (int64_t r = r0; r < smaller(r0 + 64, rows); ++r) {
        const float* values = source.read(r, n0, count, buffer);
        for (int64_t n = 0; n < count; ++n) part[n] += values[n];
      }
      for (int64_t n = 0; n < count; ++n) total[n] += part[n];
    }
    std::memcpy(out + n0, total, size_t(count) * 4);
  });
}

void activations_again(const ProjectionArgs& p) {
  constexpr int64_t kPiece = 1024;
  const Matrix act = act_of(p);
  parallel_steps(tokens_of(p), p.threads, tokens_of(p) * p.hidden > kWorthThreads, [&](int64_t row) {
    float buffer[kPiece], out[kPiece];
    for (int64_t from = 0; from < p.hidden; from += kPiece) {
      const int64_t count = smaller(p.hidden - from, kPiece);
      const float* values = widen_row(p.z, p.dtype, row * p.hidden + from, count, buffer);
      for (int64_t i = 0; i < count; i += W) {
        const int lanes = int(smaller(count - i, W));
        store_n(out + i, gelu(load_n(values + i, lanes)), lanes);
      }
      narrow_row(out, count, p.act, p.dtype, act.offset(row, from));
    }
  });
}

// The gradient of z takes the place of the activations, which are not needed any more once the gradient of w2 is there.
void second_linear(const ProjectionArgs& p) {
  const int64_t tokens = tokens_of(p);
  const bool pairs = p.dtype == DType::bf16;
  const Matrix grad(p.grad, p.dtype, p.grad_stride), w2(p.w2, p.dtype, p.w2_stride), act = act_of(p);
  if (p.grad_b2 != nullptr) column_sums(grad, tokens, p.out, p.threads, p.grad_b2);
  if (p.grad_w2 != nullptr) {
    activations_again(p);
    const Product product = {{grad, false}, {act, false}, tokens, pairs, {p.grad_w2, p.dtype, p.hidden}};
    for_each_tile(product, TileGrid(p.out, p.hidden, p.threads), p.threads, p.scratch);
  }
  if (!p.needs_first) return;
  const Product product = {{grad, true}, {w2, false}, p.out, pairs};
  for_each_tile(product, TileGrid(tokens, p.hidden, p.threads), p.threads, p.scratch, [&](const Tile& tile, float* c, int64_t stride) {
    float buffer[kTileN];
    finish_rows(tile, c, stride, p.act, p.dtype, act.stride, [&](int64_t i, float* row) {
      const float* z = widen_row(p.z, p.dtype, (tile.m0 + i) * p.hidden + tile.n0, tile.nt, buffer);
      for (int64_t n = 0; n < tile.nt; n += W) {
        const int lanes = int(smaller(tile.nt - n, W));
        store_n(row + n, load_n(row + n, lanes) * gelu_slope(load_n(z + n, lanes)), lanes);
      }
    });
  });
}

// Gradient of one token through LayerNorm. grad: of the normalised row, (4C), turned into that of the shuffled row in place if x needs it.
void through_layer_norm(const ProjectionArgs& p, int64_t row, const float* x, float* grad, float* sum_weight, float* sum_bias) {
  const int64_t width = 4 * p.channels;
  const float mean = p.stats[row], inverse = p.stats[tokens_of(p) + row];
  vf grad_sum = vf{}, product_sum = vf{};
  for (int64_t i = 0; i < width; i += W) {
    const int lanes = int(smaller(width - i, W));
    const vf centred = (load_n(x + i, lanes) - mean) * inverse, g = load_n(grad + i, lanes), scaled = g * load_n(p.ln_weight + i, lanes);
    if (sum_weight != nullptr) {
      store_n(sum_weight + i, load_n(sum_weight + i, lanes) + g * centred, lanes);
      store_n(sum_bias + i, load_n(sum_bias + i, lanes) + g, lanes);
    }
    grad_sum += scaled;                    // lanes past the end: g is 0 there
    product_sum += scaled * centred;
  }
  if (!p.needs_x) return;
  const float mean_grad = hsum(grad_sum) / float(width), mean_product = hsum(product_sum) / float(width);
  for (int64_t i = 0; i < width; i += W) {
    const int lanes = int(smaller(width - i, W));
    const vf centred = (load_n(x + i, lanes) - mean) * inverse, scaled = load_n(grad + i, lanes) * load_n(p.ln_weight + i, lanes);
    store_n(grad + i, (scaled - mean_grad - centred * mean_product) * inverse, lanes);
  }
}

// First the gradient of the normalised rows, in the place of the gradient of x; then, row by row, through LayerNorm.
void layer_norm(const ProjectionArgs& p) {
  const int64_t tokens = tokens_of(p), width = 4 * p.channels, blocks = (tokens + kBlockRows - 1) / kBlockRows;
  const Shuffled shuffled(p);
  const Matrix grad_z = act_of(p), w1(p.w1, p.dtype, p.w1_stride);
  const Product product = {{grad_z, true}, {w1, false}, p.hidden, p.dtype == DType::bf16};
  for_each_tile(product, TileGrid(tokens, width, p.threads), p.threads, p.scratch, [&](const Tile& tile, const float* c, int64_t stride) {
    for (int64_t i = 0; i < tile.mt; ++i) shuffled.write_gradient(tile.m0 + i, tile.n0, tile.nt, c + i * stride);
  });
  parallel_tasks(blocks, p.threads, tokens * width > kWorthThreads, [&](int64_t block) {
    float* grad = p.row_scratch + omp_get_thread_num() * 2 * width;
    float* sum_weight = p.partial == nullptr ? nullptr : p.partial + block * 2 * width;
    if (sum_weight != nullptr) std::memset(sum_weight, 0, size_t(2 * width) * 4);
    for (int64_t row = block * kBlockRows; row < smaller(tokens, (block + 1) * kBlockRows); ++row) {
      const float* x = shuffled.read(row, 0, width, grad + width);
      shuffled.read_gradient(row, grad);
      through_layer_norm(p, row, x, grad, sum_weight, sum_weight == nullptr ? nullptr : sum_weight + width);
      if (p.needs_x) shuffled.write_gradient(row, 0, width, grad);
    }
  });
  if (p.partial == nullptr) return;
  const Matrix partial_weight(p.partial, DType::f32, 2 * width), partial_bias(p.partial + width, DType::f32, 2 * width);
  column_sums(partial_weight, blocks, width, p.threads, p.grad_ln_weight);
  column_sums(partial_bias, blocks, width, p.threads, p.grad_ln_bias);
}

void first_linear(const ProjectionArgs& p) {
  const int64_t tokens = tokens_of(p), width = 4 * p.channels;
  const Matrix grad_z = act_of(p);
  if (p.grad_b1 != nullptr) column_sums(grad_z, tokens, p.hidden, p.threads, p.grad_b1);
  if (p.grad_w1 != nullptr) {
    const Normalised normalised(p);
    const Product product = {{grad_z, false}, {normalised, false}, tokens, p.dtype == DType::bf16, {p.grad_w1, p.dtype, width}};
    for_each_tile(product, TileGrid(p.hidden, width, p.threads), p.threads, p.scratch);
  }
  if (p.grad_x != nullptr || p.partial != nullptr) layer_norm(p);
}

void backward(const ProjectionArgs& p) {
  second_linear(p);
  if (p.needs_first) first_linear(p);
}

}  // namespace

extern const ProjectionKernels projection_kernels = {kBlockRows, &act_stride, &forward, &backward};

}  // namespace longvita::LV_ISA
