// Attention of a few new queries per sequence over its whole cache; equations in longvita_kernels/ops/decode_attention.py.
#pragma once
#include "kv_cache.h"
#include "longvita/isa.h"

namespace longvita {

struct DecodeArgs {
  DType dtype = DType::f32;      // of q and out
  Rows3 q, out;                  // (tokens, query heads, dim)
  float* lse = nullptr;          // (query heads, tokens), dense
  KvCache cache;
  Sequences sequences;
  bool causal = true;
  int64_t window_left = -1, window_right = -1;      // -1: unlimited
  float softcap = 0.0f, softmax_scale = 1.0f;
  float* scratch = nullptr;
  int64_t scratch_size = 0;      // floats; see `scratch`
  int threads = 1;
};

struct DecodeKernels {
  void (*run)(const DecodeArgs&);
  int64_t (*scratch)(const DecodeArgs&);      // floats of scratch that `run` needs
};

}  // namespace longvita
LV_DECLARE_KERNELS(DecodeKernels, decode_kernels)
