#include <pybind11/pybind11.h>

#include "lm_head.h"

namespace py = pybind11;
using namespace longvita;

void bind_lm_head(py::module_& m) {
  m.attr("masked_lm_head_rows") = cuda::kFewRows;
  m.def("masked_lm_head_plan",
        [](int dtype, int64_t rows, int64_t width, int64_t vocab, int64_t shared_limit, int64_t multiprocessors) {
          const cuda::FewRowsPlan plan = cuda::plan_few_rows(DType(dtype), rows, width, vocab, shared_limit, multiprocessors);
          return py::make_tuple(plan.rows, plan.row_bytes, plan.blocks);
        },
        "(rows a pass, bytes of a row in shared memory, blocks)");
  m.def("masked_lm_head_few_rows",
        [](int dtype, int64_t tokens, int64_t width, int64_t vocab, int64_t rows, uintptr_t hidden, int64_t hidden_stride, uintptr_t weight,
           int64_t weight_stride, uintptr_t index, uintptr_t out, uintptr_t stream) {
          check(dtype >= 0 && dtype <= 2, "masked_lm_head: dtype must be float32, bfloat16 or float16");
          check(tokens >= 0 && width >= 0 && vocab >= 0 && rows >= 0, "masked_lm_head: sizes must not be negative");
          check(hidden_stride >= 0 && weight_stride >= 0, "masked_lm_head: strides must not be negative");
          cuda::FewRowsArgs args;
          args.dtype = DType(dtype);
          check(hidden % dtype_size(args.dtype) == 0 && weight % dtype_size(args.dtype) == 0, "masked_lm_head: pointer not aligned to its element type");
          args.tokens = tokens, args.width = width, args.vocab = vocab, args.rows = rows;
          args.hidden = pointer<const char>(hidden, tokens * width, "hidden"), args.hidden_stride = hidden_stride;
          args.weight = pointer<const char>(weight, vocab * width, "weight"), args.weight_stride = weight_stride;
          args.index = pointer<const int64_t>(index, rows, "rows");
          args.out = pointer<char>(out, rows * vocab, "out");
          py::gil_scoped_release release;
          cuda::masked_lm_head_few_rows(args, reinterpret_cast<cudaStream_t>(stream));
        });
}
