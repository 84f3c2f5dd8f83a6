// Exact combination of two partial attentions on the CPU; arguments: longvita/merge_attention.h.
#pragma once
#include "longvita/isa.h"
#include "longvita/merge_attention.h"

namespace longvita {

struct MergeKernels {
  void (*forward)(const MergeArgs&, int threads);
  void (*backward)(const MergeArgs&, int threads);
};

}  // namespace longvita
LV_DECLARE_KERNELS(MergeKernels, merge_kernels)
