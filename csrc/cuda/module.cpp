// The Python module _native_cuda. Each op has its own bind_<op>.cpp; CMake lists them in LV_BIND_LIST. Addresses and streams are integers.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <string>

namespace py = pybind11;

#define LV_BIND(name) void bind_##name(py::module_&);
LV_BIND_LIST
#undef LV_BIND

namespace {

// Why no kernel can run on this machine, as far as its driver goes, or "". Does not start the driver: a process may fork after it.
std::string cannot_run() {
  int driver = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) return "there is no NVIDIA driver on this machine";
  if (driver / 1000 >= CUDART_VERSION / 1000) return "";
  const auto version = [](int number) { return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10); };
  return "they were built with CUDA " + version(CUDART_VERSION) + ", but the driver is for CUDA " + version(driver) +
         "; update it, or build with an older CUDA";
}

}  // namespace

PYBIND11_MODULE(_native_cuda, m) {
  m.doc() = "CUDA kernels of longvita_kernels. Raw pointers: call through longvita_kernels.ops.";
  m.def("cannot_run", &cannot_run, "why no kernel can run here, or an empty text");
  m.attr("emulated") =
#ifdef LV_ON_CPU
      true;
#else
      false;
#endif
  m.attr("cuda_version") = CUDART_VERSION;
#define LV_BIND(name) bind_##name(m);
  LV_BIND_LIST
#undef LV_BIND
}
