// The Python module. Each op has its own bind_<op>.cpp; CMake lists them in LV_BIND_LIST.
#include <pybind11/pybind11.h>

#include "longvita/isa.h"

namespace py = pybind11;

#define LV_BIND(name) void bind_##name(py::module_&);
LV_BIND_LIST
#undef LV_BIND

PYBIND11_MODULE(_native, m) {
  using longvita::Isa;
  m.doc() = "Native kernels of longvita_kernels. Raw pointers: call through longvita_kernels.ops.";
  m.def("isa", [] { return longvita::isa_name(longvita::active_isa()); }, "the instruction set in use");
  m.def("built_isas", [] {
    py::dict out;
    for (Isa isa : {Isa::portable, Isa::avx2, Isa::avx512, Isa::avx512bf16, Isa::emulated}) {
      if (longvita::isa_built(isa)) out[longvita::isa_name(isa)] = longvita::isa_runs_here(isa);
    }
    return out;
  }, "instruction set → whether this machine can run it");
#define LV_BIND(name) bind_##name(m);
  LV_BIND_LIST
#undef LV_BIND
}
