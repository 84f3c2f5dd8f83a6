#include "longvita/isa.h"

#include <cstdlib>
#include <cstring>
#include <string>

#include "longvita/errors.h"

namespace longvita {

namespace {
constexpr Isa kAll[] = {Isa::portable, Isa::avx2, Isa::avx512, Isa::avx512bf16, Isa::emulated};

Isa choose() {
  const char* wish = std::getenv("LONGVITA_ISA");
  Isa cap = Isa::avx512bf16;
  if (wish != nullptr && *wish != '\0') {
    bool known = false;
    for (Isa isa : kAll) {
      if (std::strcmp(wish, isa_name(isa)) == 0) cap = isa, known = true;
    }
    check(known, std::string("LONGVITA_ISA: expected portable, avx2, avx512, avx512bf16 or emulated, got '") + wish +
                     "'; unset it to use the best this machine can run");
  }
  if (cap == Isa::emulated) {
    check(isa_built(cap) && isa_runs_here(cap), "LONGVITA_ISA=emulated needs a machine with AVX2; unset LONGVITA_ISA");
    return cap;
  }
  Isa best = Isa::portable;
  for (Isa isa : {Isa::avx2, Isa::avx512, Isa::avx512bf16}) {
    if (isa <= cap && isa_built(isa) && isa_runs_here(isa)) best = isa;
  }
  return best;
}
}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx2: return "avx2";
    case Isa::avx512: return "avx512";
    case Isa::avx512bf16: return "avx512bf16";
    case Isa::emulated: return "emulated";
    default: return "portable";
  }
}

bool isa_built(Isa isa) {
#ifdef LV_HAVE_avx2
  (void)isa;
  return true;
#else
  return isa == Isa::portable;
#endif
}

bool isa_runs_here(Isa isa) {
#ifdef LV_HAVE_avx2
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  switch (isa) {
    case Isa::avx2:
    case Isa::emulated: return avx2;
    case Isa::avx512: return avx512;
    case Isa::avx512bf16: return avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
    default: return true;
  }
#else
  return isa == Isa::portable;
#endif
}

Isa active_isa() {
  static const Isa chosen = choose();
  return chosen;
}

}  // namespace longvita
