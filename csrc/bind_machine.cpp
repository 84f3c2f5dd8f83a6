#include <pybind11/pybind11.h>

#include "longvita/views.h"
#include "machine.h"

namespace py = pybind11;
using namespace longvita;

void bind_machine(py::module_& m) {
  m.def("machine_multiply_add", [](int64_t rounds, bool pairs, int threads) {
    check(rounds >= 0 && threads > 0, "machine_multiply_add: rounds and threads must be positive");
    py::gil_scoped_release release;
    float sink = 0.0f;
    return machine_kernels().multiply_add(rounds, pairs, threads, &sink);
  }, "multiply-adds on registers → floating-point operations done");
  m.def("machine_read", [](uintptr_t data, int64_t bytes, int threads) {
    check(threads > 0 && bytes % (64 * threads) == 0, "machine_read: bytes must be a multiple of 64 × threads");
    const char* from = pointer<const char>(data, bytes, "data");
    py::gil_scoped_release release;
    int32_t sink = 0;
    machine_kernels().read(from, bytes, threads, &sink);
    return sink;
  }, "reads memory once, split over the threads");
}
