// Small kernels that use the emulator's instructions one at a time, rightly and wrongly (tests/cuda/test_emulated_machine.py).
#pragma once
#include "../sm90_launch.h"

namespace longvita::selftest {

struct SelfTest {
  uint16_t* a;                  // (64, 16 · steps) row by row, bf16 or f16
  uint16_t* b;                  // (n, 16 · steps), or transposed
  float* d;                     // (128 threads, n / 2): accumulators as the threads have them
  int64_t n, steps, dtype, a_in_registers, across;
};

using namespace longvita::sm90;

// Everything of a product of one warpgroup: A and B come by tensor copies in halves of 64 columns.
struct Tiles {
  alignas(1024) uint16_t a[2][64][64];
  alignas(1024) uint16_t b[2][128][64];
  Barrier full;
};

struct Parameters { TensorMap a, b; SelfTest t; };

inline void start(Tiles& s) {
  if (thread() == 0) barrier_init(s.full, 1), barriers_ready();
  block_sync();
}

template <class T, int N, bool ACROSS> void product_kernel(const Parameters& p) {
  Tiles& s = shared<Tiles>();
  start(s);
  const int depth = int(p.t.steps) * 16, halves = (depth + 63) / 64, b_rows = ACROSS ? depth : N, b_halves = ACROSS ? N / 64 : halves;
  if (thread() == 0) {
    barrier_expect(s.full, (halves * 64 + b_halves * b_rows) * 128);
    for (int h = 0; h < halves; ++h) load_box(s.a[h], p.a, s.full, 64 * h, 0, 0);
    for (int h = 0; h < b_halves; ++h) load_box(s.b[h], p.b, s.full, 64 * h, 0, 0);
  }
  barrier_wait(s.full, 0);
  float d[N / 2] = {};
  uint32_t a[8][4] = {};
  const int row = thread() / 32 * 16 + lane() / 4;
  for (int k = 0; k < p.t.steps; ++k) {
    for (int i = 0; i < 4; ++i) memcpy(&a[k][i], p.t.a + (row + 8 * (i % 2)) * depth + 16 * k + 8 * (i / 2) + lane() % 4 * 2, 4);
  }
  multiply_fence();
  for (int k = 0; k < p.t.steps; ++k) {
    const uint64_t a_at = along_rows(shared_address(s.a[k / 4]) + k % 4 * 32);
    const uint64_t b_at = ACROSS ? across_rows(shared_address(s.b[0]) + k * 2048, sizeof(s.b[0]))
                                 : along_rows(shared_address(s.b[k / 4]) + k % 4 * 32);
    if (p.t.a_in_registers) multiply<T, N, ACROSS>(d, (const uint32_t*)a[k], b_at, k > 0);
    else multiply<T, N, ACROSS>(d, a_at, b_at, k > 0);
  }
  multiply_commit();
  multiply_wait<0>();
  memcpy(p.t.d + thread() * (N / 2), d, sizeof(d));
}

// A without swizzle: units of 8 rows × 16 bytes, written by the threads themselves. B likewise, 8 columns. One step of 16.
inline void plain_kernel(const Parameters& p) {
  struct Units { alignas(128) uint16_t a[8][2][8][8], b[2][8][8]; };
  Units& s = shared<Units>();
  for (int i = thread(); i < 64 * 16; i += 128) shared_store(&s.a[i / 16 / 8][i % 16 / 8][i / 16 % 8][i % 8], p.t.a[i]);
  for (int i = thread(); i < 8 * 16; i += 128) shared_store(&s.b[i % 16 / 8][i / 16][i % 8], p.t.b[i]);
  async_fence();
  block_sync();
  const auto plain = [](uint32_t address, uint32_t leading, uint32_t stride) {
    return descriptor(address, leading, stride) & ~(uint64_t(3) << 62);
  };
  float d[4] = {};
  multiply_fence();
  multiply<bf16_t, 8, false>(d, plain(shared_address(&s.a), 128, 256), plain(shared_address(&s.b), 128, 256), false);
  multiply_commit();
  multiply_wait<0>();
  memcpy(p.t.d + thread() * 4, d, sizeof(d));
}

// ------------------------------------------------------------------------------------------------------------- kernels that are wrong

struct Wrong {
  const char* name;
  void (*kernel)(const Parameters&);
};

// Most begin with initialised barriers.
inline Tiles& started() {
  Tiles& s = shared<Tiles>();
  start(s);
  return s;
}
inline void load_a(Tiles& s, const Parameters& p, int bytes = 64 * 128) {
  if (thread() == 0) barrier_expect(s.full, bytes), load_box(s.a[0], p.a, s.full, 0, 0, 0);
}
// One product of the tile in s.a with itself, from registers or memory, unless it breaks a rule.
struct Steps { bool wait_copy = true, fence = true, touch = false, change = false, wait = true; uint32_t shift = 0; };
inline void square(const Parameters& p, Steps steps) {
  Tiles& s = started();
  load_a(s, p);
  if (steps.wait_copy) barrier_wait(s.full, 0);
  float d[32] = {};
  uint32_t a[4] = {};
  const uint64_t b = along_rows(shared_address(s.a[0]) + steps.shift);
  if (steps.fence) multiply_fence();
  multiply<bf16_t, 64, false>(d, (const uint32_t*)a, b, false);
  multiply_commit();
  if (steps.touch) d[0] = 1.0f;
  if (steps.change) a[3] = 7;
  if (steps.wait) multiply_wait<0>();
}

inline const Wrong kWrong[] = {
    {"a barrier nobody arrives at", [](const Parameters&) { barrier_wait(started().full, 0); }},
    {"fewer bytes than expected", [](const Parameters& p) { Tiles& s = started(); load_a(s, p, 64 * 128 + 16); barrier_wait(s.full, 0); }},
    {"half of the block at a barrier", [](const Parameters&) { if (thread() < 64) block_sync(); }},
    {"a barrier not initialised", [](const Parameters&) { barrier_arrive(shared<Tiles>().full); }},
    {"one arrival too many", [](const Parameters& p) { Tiles& s = started(); if (thread() == 0) load_a(s, p), barrier_arrive(s.full); }},
    {"a product before its copy", [](const Parameters& p) { square(p, {false}); }},
    {"a product without a fence", [](const Parameters& p) { square(p, {true, false}); }},
    {"an accumulator overwritten", [](const Parameters& p) { square(p, {true, true, true}); }},
    {"an operand register changed", [](const Parameters& p) { square(p, {true, true, false, true}); }},
    {"a product not waited for", [](const Parameters& p) { square(p, {true, true, false, false, false}); }},
    {"a descriptor inside of a unit", [](const Parameters& p) { square(p, {true, true, false, false, true, 128}); }},
    {"a descriptor outside of the memory", [](const Parameters& p) { square(p, {true, true, false, false, true, 64 << 10}); }},
    {"a write that products do not see", [](const Parameters& p) {
       Tiles& s = started();
       load_a(s, p);
       barrier_wait(s.full, 0);
       if (thread() == 5) shared_store(&s.a[0][3][24], uint16_t(0));      // the swizzle puts columns 0 … 7 of row 3 there
       block_sync();
       float d[32] = {};
       multiply_fence();
       multiply<bf16_t, 64, false>(d, along_rows(shared_address(s.a[0])), along_rows(shared_address(s.a[0])), false);
       multiply_commit();
       multiply_wait<0>();
     }},
    {"a copy over an operand in use", [](const Parameters& p) {
       Tiles& s = started();
       load_a(s, p);
       barrier_wait(s.full, 0);
       float d[32] = {};
       multiply_fence();
       multiply<bf16_t, 64, false>(d, along_rows(shared_address(s.a[0])), along_rows(shared_address(s.a[0])), false);
       multiply_commit();
       load_a(s, p);
       multiply_wait<0>();
     }},
    {"a read before its copy", [](const Parameters& p) { Tiles& s = started(); load_a(s, p); block_sync(); shared_load(&s.a[0][0][0]); }},
    {"a box not aligned", [](const Parameters& p) { Tiles& s = started(); if (thread() == 0) load_box(s.a[0][4], p.a, s.full, 0, 0, 0); }},
    {"a warp that diverges", [](const Parameters&) { if (lane() < 16) warp_sync(); else warp_any(true); }},
    {"a read outside of global memory", [](const Parameters& p) { global_load(p.t.a - 1); }},
    {"a write outside of global memory", [](const Parameters& p) { global_store(p.t.d + 128 * p.t.n / 2, 0.0f); }},
    {"a write to what is only read", [](const Parameters& p) { global_store(p.t.a, uint16_t(0)); }},
    {"an address not aligned", [](const Parameters& p) { global_load(reinterpret_cast<const Word4*>(p.t.a + 1)); }},
    {"too many registers", [](const Parameters&) { registers_take<256>(), registers_take<256>(), registers_take<256>(); }},
    {"more shared memory than there is", [](const Parameters&) { struct Large { char x[1 << 20]; }; shared<Large>(); }},
};

inline void run(const std::string& name, const SelfTest& t) {
  const int64_t depth = t.steps * 16;
  const Rows3 a{reinterpret_cast<char*>(t.a), 64, 1, depth, depth, depth};
  const int64_t b_rows = t.across ? depth : t.n, b_dim = t.across ? t.n : depth;
  const Rows3 b{reinterpret_cast<char*>(t.b), b_rows, 1, b_dim, b_dim, b_dim};
  const Parameters p{tensor_map(a, DType(t.dtype), 64, 64), tensor_map(b, DType(t.dtype), int(b_rows), 64), t};
  void (*kernel)(const Parameters&) = nullptr;
  const auto choose = [&](auto element, auto n) {
    using T = decltype(element);
    return t.across ? product_kernel<T, n(), true> : product_kernel<T, n(), false>;
  };
  const auto with_n = [&](auto element) {
    return t.n == 64 ? choose(element, std::integral_constant<int, 64>{}) : choose(element, std::integral_constant<int, 128>{});
  };
  if (name == "plain") kernel = plain_kernel;
  if (name == "product") kernel = DType(t.dtype) == DType::bf16 ? with_n(bf16_t{}) : with_n(f16_t{});
  for (const Wrong& w : kWrong) {
    if (name == w.name) kernel = w.kernel;
  }
  check(kernel != nullptr, "no self-test is called ", name);
  launch(kernel, p, 1, 128, sizeof(Tiles), nullptr);
}

}  // namespace longvita::selftest
