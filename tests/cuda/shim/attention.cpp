// The kernels of attention on their emulator, which may touch all memory here: the tests of the emulator hold them to their tensors.
#include "attention_forward.cu"
#include "attention_backward.cu"

static const bool allowed = (longvita::emulate::regions.push_back({0, UINTPTR_MAX, true}), true);
