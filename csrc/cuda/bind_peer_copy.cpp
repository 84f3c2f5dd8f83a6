#include <pybind11/pybind11.h>

#include "peer_copy.h"

namespace py = pybind11;
using namespace longvita::cuda;

void bind_peer_copy(py::module_& m) {
  using Release = py::call_guard<py::gil_scoped_release>;
  m.def("memory_export",
        [](uintptr_t address) {
          const ExportedMemory memory = memory_export(address);
          return py::make_tuple(py::bytes(memory.handle), memory.offset);
        },
        "(handle, offset) of device memory, for another process");
  m.def("memory_open", [](const py::bytes& handle) { return memory_open(handle); }, "start of the allocation of a handle");
  m.def("memory_close", &memory_close, Release());
  m.def("memory_copy", &memory_copy, Release());
  m.def("event_create", &event_create);
  m.def("event_export", [](uintptr_t event) { return py::bytes(event_export(event)); });
  m.def("event_open", [](const py::bytes& handle) { return event_open(handle); });
  m.def("event_destroy", &event_destroy);
  m.def("event_record", &event_record, Release());
  m.def("event_wait", &event_wait, Release());
  m.def("stream_create", &stream_create);
  m.def("stream_destroy", &stream_destroy);
}
