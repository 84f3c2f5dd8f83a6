#include <pybind11/pybind11.h>

#include "longvita/views.h"
#include "selftest.h"

namespace py = pybind11;

void bind_selftest(py::module_& m) {
  using namespace longvita;
  m.def("lanes", [] { return selftest_kernels().lanes; }, "float lanes per vector of the active instruction set");
  m.def("simd_exp2", [](uintptr_t x, uintptr_t y, int64_t n) {
    selftest_kernels().exp2(pointer<const float>(x, n, "x"), pointer<float>(y, n, "y"), n);
  });
  m.def("simd_tanh", [](uintptr_t x, uintptr_t y, int64_t n) {
    selftest_kernels().tanh(pointer<const float>(x, n, "x"), pointer<float>(y, n, "y"), n);
  });
  m.def("simd_round_trip", [](uintptr_t x, uintptr_t y, int64_t n, int dtype) {
    selftest_kernels().round_trip(pointer<const float>(x, n, "x"), pointer<float>(y, n, "y"), n, DType(dtype));
  });
}
