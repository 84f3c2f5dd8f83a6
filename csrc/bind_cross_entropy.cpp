#include <pybind11/pybind11.h>

#include "cross_entropy.h"
#include "lm_head.h"
#include "longvita/views.h"

namespace py = pybind11;
using namespace longvita;

void bind_cross_entropy(py::module_& m) {
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
           uintptr_t scratch, int threads, bool recompute, uintptr_t coefficients, uintptr_t row_weight, float smoothing, float z_loss,
           uintptr_t logits, uintptr_t grad_hidden, uintptr_t grad_weight) {
          check(dtype >= 0 && dtype <= 2, "linear_cross_entropy: dtype must be float32, bfloat16 or float16");
          check(tokens >= 0 && width >= 0 && vocab > 0 && rows >= 0 && chunk > 0, "linear_cross_entropy: a size is negative or zero");
          check(threads > 0, "linear_cross_entropy: needs at least one thread");
          const bool needs_gradients = grad_hidden != 0 || grad_weight != 0;
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
          p.statistics = pointer<float>(statistics, 5 * rows, "statistics");
          p.chunk = chunk;
          p.partial = pointer<float>(partial, recompute || rows == 0 ? 0 : 3 * blocks * chunk, "partial");
          p.scratch = pointer<float>(scratch, threads * lm_head_kernels().scratch_floats, "scratch");
          p.threads = threads;
          p.recompute = recompute;
          p.coefficients = pointer<float>(coefficients, needs_gradients ? 3 * rows : 0, "coefficients");
          p.row_weight = reinterpret_cast<const float*>(row_weight);
          p.smoothing = smoothing, p.z_loss = z_loss;
          p.logits = pointer<char>(logits, needs_gradients ? chunk * (recompute ? rows : rows > 0 ? vocab : 0) : 0, "logits");
          p.grad_hidden = reinterpret_cast<float*>(grad_hidden);
          p.grad_weight = reinterpret_cast<void*>(grad_weight);
          py::gil_scoped_release release;
          cross_entropy_kernels().run(p);
        });
}
