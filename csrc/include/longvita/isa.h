// Instruction sets: which were built, which one runs.
//
// A kernel header declares its table of entry points once,
//     struct MergeKernels { void (*forward)(const MergeArgs&); };
//     LV_DECLARE_KERNELS(MergeKernels, merge_kernels)
// its .cpp, compiled once per set, defines it,
//     namespace longvita::LV_ISA { extern const MergeKernels merge_kernels = {&forward}; }
// and a binding calls `longvita::merge_kernels().forward(args)`.
#pragma once

namespace longvita {

enum class Isa : int { portable = 0, avx2 = 1, avx512 = 2, avx512bf16 = 3, emulated = 4 };

const char* isa_name(Isa isa);
bool isa_built(Isa isa);
bool isa_runs_here(Isa isa);      // by cpuid, operating system support included
Isa active_isa();                 // the best one that was built and runs here, capped by LONGVITA_ISA when it was first asked

}  // namespace longvita

#ifdef LV_HAVE_avx2
#define LV_DECLARE_KERNELS(Type, name)                                  \
  namespace longvita {                                                  \
  namespace portable { extern const Type name; }                        \
  namespace avx2 { extern const Type name; }                            \
  namespace avx512 { extern const Type name; }                          \
  namespace avx512bf16 { extern const Type name; }                      \
  namespace emulated { extern const Type name; }                        \
  inline const Type& name() {                                           \
    switch (active_isa()) {                                             \
      case Isa::avx2: return avx2::name;                                \
      case Isa::avx512: return avx512::name;                            \
      case Isa::avx512bf16: return avx512bf16::name;                    \
      case Isa::emulated: return emulated::name;                        \
      default: return portable::name;                                   \
    }                                                                   \
  }                                                                     \
  }
#elif defined(LV_HAVE_portable)
#define LV_DECLARE_KERNELS(Type, name)                                  \
  namespace longvita {                                                  \
  namespace portable { extern const Type name; }                        \
  inline const Type& name() { return portable::name; }                  \
  }
#else  // inside a kernel source: only its own namespace
#define LV_DECLARE_KERNELS(Type, name) \
  namespace longvita::LV_ISA { extern const Type name; }
#endif
