#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <string>
#include <utility>

#include "cross_entropy.h"
#include "lm_head.h"
#include "longvita/views.h"

namespace py = pybind11;
using namespace longvita;

namespace {

GradientWay way_of(const std::string& name) {
  if (name == "at_once") return GradientWay::at_once;
  if (name == "keep") return GradientWay::keep;
  if (name == "finish") return GradientWay::finish;
  check(name == "recompute", "linear_cross_entropy: way is '", name, "'; expected at_once, keep, finish or recompute");
  return GradientWay::recompute;
}

// The supervised rows of (tokens) labels: their numbers, then their labels, in `rows` (2 · tokens). Returns how many.
// In the words of ops/_logit_chunks.py, which checks where this does not run.
int64_t supervised(const int64_t* labels, int64_t tokens, int64_t ignore, int64_t vocab, int64_t* rows) {
  int64_t n = 0;
  for (int64_t t = 0; t < tokens; ++t) {
    if (labels[t] == ignore) continue;
    check(labels[t] >= 0 && labels[t] < vocab, "labels[", t, "] is ", labels[t], "; expected 0 … ", vocab - 1, ", or ignore_index = ", ignore,
          ". Remedy: check that the tokenizer belongs to the model, or set such labels to ignore_index");
    rows[n++] = t;
  }
  for (int64_t i = 0; i < n; ++i) rows[tokens + i] = labels[rows[i]];
  return n;
}

// The loss of all rows without gradients; the arithmetic of ops/linear_cross_entropy.py (_row_loss, _with_stats), sums in double.
// Σ lse² goes where `square_sum` points, if it does. Returns the numbers of supervised and of correct rows.
std::pair<int64_t, int64_t> sum_loss(const CrossEntropyArgs& p, bool mean, float* out, float* square_sum) {
  double total = 0, weights = 0, squares = 0;
  int64_t correct = 0;
  const float *lse = p.statistics, *target = lse + p.rows, *sum = target + p.rows, *largest = sum + p.rows;
  for (int64_t i = 0; i < p.rows; ++i) {
    const float weight = p.row_weight == nullptr ? 1.0f : p.row_weight[p.index[i]];
    float loss = (1.0f - p.smoothing) * (lse[i] - target[i]);
    if (p.smoothing > 0.0f) loss += p.smoothing * (lse[i] - sum[i] / float(p.vocab));
    if (p.z_loss > 0.0f) loss += p.z_loss * lse[i] * lse[i];
    total += double(loss) * weight, weights += weight, squares += double(lse[i]) * lse[i];
    correct += target[i] >= largest[i];
  }
  *out = float(mean && weights != 0 ? total / weights : total);
  if (square_sum != nullptr) *square_sum = float(squares);
  return {p.rows, correct};
}

}  // namespace

void bind_cross_entropy(py::module_& m) {
  m.def("linear_cross_entropy_loss",
        [](int dtype, int64_t tokens, int64_t width, int64_t vocab, uintptr_t hidden, int64_t hidden_stride, uintptr_t weight,
           int64_t weight_stride, uintptr_t labels, int64_t ignore, uintptr_t row_weight, float softcap, float smoothing, float z_loss,
           bool mean, int64_t chunk, uintptr_t rows, uintptr_t buffer, int64_t floats, int threads, uintptr_t loss,
           uintptr_t square_sum) {
          check(dtype >= 0 && dtype <= 2, "linear_cross_entropy: dtype must be float32, bfloat16 or float16");
          check(tokens >= 0 && width >= 0 && vocab > 0 && chunk > 0 && threads > 0, "linear_cross_entropy: a size is negative or zero");
          CrossEntropyArgs p = {};
          int64_t* const index = pointer<int64_t>(rows, 2 * tokens, "rows");
          p.dtype = DType(dtype), p.width = width, p.vocab = vocab, p.threads = threads;
          p.hidden = pointer<const char>(hidden, tokens * width, "hidden"), p.hidden_stride = hidden_stride;
          p.weight = pointer<const char>(weight, vocab * width, "weight"), p.weight_stride = weight_stride;
          p.rows = supervised(pointer<const int64_t>(labels, tokens, "labels"), tokens, ignore, vocab, index);
          p.index = index, p.labels = index + tokens, p.row_weight = reinterpret_cast<const float*>(row_weight);
          p.softcap = softcap, p.smoothing = smoothing, p.z_loss = z_loss;
          p.chunk = std::max<int64_t>(1, std::min(chunk, p.rows));
          const int64_t blocks = (vocab + cross_entropy_kernels().block - 1) / cross_entropy_kernels().block;
          const int64_t scratch = threads * lm_head_kernels().scratch_floats;
          check(floats >= scratch + 5 * p.rows + 3 * blocks * p.chunk, "linear_cross_entropy: scratch is too small");
          p.scratch = pointer<float>(buffer, floats, "scratch");
          p.statistics = p.scratch + scratch, p.partial = p.statistics + 5 * p.rows;
          py::gil_scoped_release release;
          cross_entropy_kernels().run(p);
          return sum_loss(p, mean, pointer<float>(loss, 1, "loss"), reinterpret_cast<float*>(square_sum));
        },
        "loss of all supervised rows, without gradients; (supervised, correct)");
  m.def("linear_cross_entropy_block", [] { return cross_entropy_kernels().block; }, "columns of the vocabulary behind one entry of `partial`");
  m.def("linear_cross_entropy_logit_bytes", [](int dtype, float softcap, bool recompute) {
    return cross_entropy_kernels().keeps_bf16(DType(dtype), softcap, recompute) ? 2 : 4;
  });
  m.def("linear_cross_entropy_scale", [](uintptr_t values, int64_t count, float factor, int dtype, uintptr_t out, int threads) {
    check(dtype >= 0 && dtype <= 2, "linear_cross_entropy: dtype must be float32, bfloat16 or float16");
    check(threads > 0, "linear_cross_entropy: needs at least one thread");
    const float* from = pointer<const float>(values, count, "values");
    void* to = pointer<char>(out, count, "out");
    py::gil_scoped_release release;
    cross_entropy_kernels().scale(from, count, factor, DType(dtype), to, threads);
  });
  m.def("linear_cross_entropy_run",
        [](int dtype, int64_t tokens, int64_t width, int64_t vocab, int64_t rows, uintptr_t hidden, int64_t hidden_stride, uintptr_t weight,
           int64_t weight_stride, uintptr_t index, uintptr_t labels, float softcap, uintptr_t statistics, int64_t chunk, uintptr_t partial,
           uintptr_t scratch, int threads, const std::string& way, uintptr_t coefficients, uintptr_t row_weight, float smoothing,
           float z_loss, uintptr_t logits, float factor, bool needs_hidden, uintptr_t grad_hidden, bool needs_weight, uintptr_t grad_weight) {
          check(dtype >= 0 && dtype <= 2, "linear_cross_entropy: dtype must be float32, bfloat16 or float16");
          check(tokens >= 0 && width >= 0 && vocab > 0 && rows >= 0 && chunk > 0, "linear_cross_entropy: a size is negative or zero");
          check(threads > 0, "linear_cross_entropy: needs at least one thread");
          const GradientWay ways = way_of(way);
          const bool keeps = ways == GradientWay::keep, loss = keeps || ways == GradientWay::at_once, recompute = ways == GradientWay::recompute;
          // Never the address: an empty gradient has none, whether it is needed or not.
          const bool needs_gradients = keeps || needs_hidden || needs_weight;
          check(loss || needs_gradients, "linear_cross_entropy: nothing to ", way);
          check(recompute || ways == GradientWay::at_once || chunk >= rows, "linear_cross_entropy: the logits of all rows are kept");
          const int64_t blocks = (vocab + cross_entropy_kernels().block - 1) / cross_entropy_kernels().block;
          CrossEntropyArgs p = {};
          p.dtype = DType(dtype);
          p.width = width, p.vocab = vocab, p.rows = rows;
          p.hidden = pointer<const char>(hidden, tokens * width, "hidden"), p.hidden_stride = hidden_stride;
          p.weight = pointer<const char>(weight, vocab * width, "weight"), p.weight_stride = weight_stride;
          p.index = pointer<const int64_t>(index, rows, "index");
          for (int64_t i = 0; i < rows; ++i) check(p.index[i] >= 0 && p.index[i] < tokens, "linear_cross_entropy: a row is out of range");
          p.labels = pointer<const int64_t>(labels, rows, "labels");
          p.softcap = softcap;
          p.statistics = pointer<float>(statistics, loss || recompute ? 5 * rows : 0, "statistics");
          p.chunk = chunk;
          p.partial = pointer<float>(partial, loss && rows > 0 ? 3 * blocks * chunk : 0, "partial");
          p.scratch = pointer<float>(scratch, threads * lm_head_kernels().scratch_floats, "scratch");
          p.threads = threads;
          p.way = ways;
          p.coefficients = pointer<float>(coefficients, needs_gradients && (loss || recompute) ? 3 * rows : 0, "coefficients");
          p.row_weight = reinterpret_cast<const float*>(row_weight);
          p.smoothing = smoothing, p.z_loss = z_loss;
          p.logits = pointer<char>(logits, needs_gradients ? chunk * (recompute ? rows : rows > 0 ? vocab : 0) : 0, "logits");
          p.factor = factor;
          const int64_t grad_rows = ways == GradientWay::finish ? tokens : rows;
          needs_hidden &= !keeps, needs_weight &= !keeps;      // they wait for finish
          p.grad_hidden = needs_hidden ? pointer<char>(grad_hidden, grad_rows * width, "the gradient of hidden") : nullptr;
          p.grad_weight = needs_weight ? pointer<char>(grad_weight, vocab * width, "the gradient of weight") : nullptr;
          py::gil_scoped_release release;
          cross_entropy_kernels().run(p);
        });
}
