#include "selftest.h"

#include "simd.h"

namespace longvita::LV_ISA {
namespace {

template <vf (*F)(vf)>
void map(const float* x, float* y, int64_t n) {
  for (int64_t i = 0; i < n; i += W) {
    const int m = n - i < W ? int(n - i) : W;
    store_n(y + i, F(load_n(x + i, m)), m);
  }
}

template <class T>
void through(const float* x, float* y, int64_t n) {
  T buffer[W];
  for (int64_t i = 0; i < n; i += W) {
    const int m = n - i < W ? int(n - i) : W;
    store(buffer, load_n(x + i, m));
    store_n(y + i, load(buffer), m);
  }
}

void round_trip(const float* x, float* y, int64_t n, DType dtype) {
  if (dtype == DType::bf16) through<bf16_t>(x, y, n);
  else if (dtype == DType::f16) through<f16_t>(x, y, n);
  else through<float>(x, y, n);
}

}  // namespace

extern const SelftestKernels selftest_kernels = {W, &map<vexp2>, &map<vtanh>, &round_trip};

}  // namespace longvita::LV_ISA
