#include <pybind11/pybind11.h>

#include "lm_head.h"
#include "longvita/views.h"

namespace py = pybind11;
using namespace longvita;

namespace {

LmHeadArgs arguments(int dtype, int64_t tokens, int64_t width, int64_t vocab, int64_t rows, uintptr_t hidden, int64_t hidden_stride,
                     uintptr_t weight, int64_t weight_stride, uintptr_t index, uintptr_t scratch, int64_t scratch_floats, int threads) {
  check(dtype >= 0 && dtype <= 2, "masked_lm_head: dtype must be float32, bfloat16 or float16");
  check(tokens >= 0 && width >= 0 && vocab >= 0 && rows >= 0, "masked_lm_head: sizes must not be negative");
  check(threads > 0, "masked_lm_head: needs at least one thread");
  LmHeadArgs p = {};
  p.dtype = DType(dtype);
  p.tokens = tokens, p.width = width, p.vocab = vocab, p.rows = rows;
  p.hidden = pointer<const char>(hidden, tokens * width, "hidden"), p.hidden_stride = hidden_stride;
  p.weight = pointer<const char>(weight, vocab * width, "weight"), p.weight_stride = weight_stride;
  p.index = pointer<const int64_t>(index, rows, "rows");
  for (int64_t m = 0; m < rows; ++m) {      // in the words of ops/masked_lm_head.py, which checks where this kernel does not run
    check(p.index[m] >= 0 && p.index[m] < tokens, "rows[", m, "] is ", p.index[m], "; expected 0 … ", tokens - 1, ", because hidden has ", tokens,
          " rows. Remedy: count rows from the start of hidden (negative numbers do not count from the end)");
  }
  p.scratch = pointer<float>(scratch, scratch_floats, "scratch");
  p.threads = threads;
  return p;
}

}  // namespace

void bind_lm_head(py::module_& m) {
  m.def("masked_lm_head_thin_rows", [] { return lm_head_kernels().thin_rows; }, "rows up to which forward needs no scratch");
  m.def("gemm_scratch_floats", [] { return lm_head_kernels().scratch_floats; }, "fp32 scratch of a matrix product, per thread");
  m.def("masked_lm_head_forward",
        [](int dtype, int64_t tokens, int64_t width, int64_t vocab, int64_t rows, uintptr_t hidden, int64_t hidden_stride, uintptr_t weight,
           int64_t weight_stride, uintptr_t index, uintptr_t scratch, int threads, uintptr_t out, uintptr_t gathered) {
          const int64_t floats = rows <= lm_head_kernels().thin_rows ? 0 : threads * lm_head_kernels().scratch_floats;
          LmHeadArgs p = arguments(dtype, tokens, width, vocab, rows, hidden, hidden_stride, weight, weight_stride, index, scratch, floats,
                                   threads);
          p.out = pointer<char>(out, rows * vocab, "out");
          p.gathered = pointer<float>(gathered, 4 * ((width + 15) / 16 * 16), "gathered");
          py::gil_scoped_release release;
          lm_head_kernels().forward(p);
        });
  m.def("masked_lm_head_backward",
        [](int dtype, int64_t tokens, int64_t width, int64_t vocab, int64_t rows, uintptr_t hidden, int64_t hidden_stride, uintptr_t weight,
           int64_t weight_stride, uintptr_t index, uintptr_t scratch, int threads, uintptr_t grad, int64_t grad_stride,
           uintptr_t grad_hidden, uintptr_t grad_rows, uintptr_t owner, uintptr_t grad_weight) {
          LmHeadArgs p = arguments(dtype, tokens, width, vocab, rows, hidden, hidden_stride, weight, weight_stride, index, scratch,
                                   threads * lm_head_kernels().scratch_floats, threads);
          p.grad = pointer<const char>(grad, rows * vocab, "grad"), p.grad_stride = grad_stride;
          p.grad_hidden = reinterpret_cast<void*>(grad_hidden);
          p.grad_weight = reinterpret_cast<void*>(grad_weight);
          if (grad_hidden != 0) {
            p.grad_rows = pointer<float>(grad_rows, rows * width, "grad_rows");
            p.owner = pointer<int64_t>(owner, tokens, "owner");
          }
          py::gil_scoped_release release;
          lm_head_kernels().backward(p);
        });
}
