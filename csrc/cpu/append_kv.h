// Writing new keys and values into a cache, quantised where it is 8 bits wide.
#pragma once
#include "kv_cache.h"
#include "longvita/isa.h"

namespace longvita {

struct AppendArgs {
  DType dtype = DType::f32;      // of k and v
  Rows3 k, v;
  KvCache cache;
  Sequences sequences;
  int threads = 1;
};

struct AppendKernels {
  void (*append)(const AppendArgs&);
};

}  // namespace longvita
LV_DECLARE_KERNELS(AppendKernels, append_kernels)
