// Small kernels that use the emulator's instructions one at a time, rightly and wrongly (tests/cuda/test_emulated_machine.py).
#pragma once
#include "../sm90_launch.h"

namespace longvita::selftest {

struct SelfTest {
  uint16_t* a;                  // (64, 16 · steps) row by row, bf16 or f16
  uint16_t* b;                  // (n, 16 · steps), or transposed
  float* d;                     // (128 threads, n / 2): accumulators as the threads have them
  int64_t n, steps, dtype, a_from, across;      // A: 0 copied, 1 in registers, 2 written transposed by store_matrices
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

// Aᵀ by store_matrices: rows are k, 64 columns, swizzled; each warp writes 16 rows of 64.
inline void write_across(Tiles& s, const SelfTest& t) {
  const int depth = int(t.steps) * 16, warp = thread() / 32;
  for (int h = 0; h < (depth + 63) / 64; ++h) {
    for (int j = 0; j < 8; j += 2) {
      uint32_t words[4];
      for (int i = 0; i < 4; ++i) {
        const int k = 64 * h + 16 * warp + lane() / 4 + i % 2 * 8, m = 8 * (j + i / 2) + 2 * (lane() % 4);
        words[i] = k < depth ? t.a[m * depth + k] | uint32_t(t.a[(m + 1) * depth + k]) << 16 : 0;
      }
      store_matrices(&s.a[h][16 * warp + lane() % 16][((j + lane() / 16) ^ lane() % 8) * 8], words);
    }
  }
  async_fence();
  block_sync();
}

template <class T, int N, bool ACROSS> void product_kernel(const Parameters& p) {
  Tiles& s = shared<Tiles>();
  start(s);
  const int depth = int(p.t.steps) * 16, halves = (depth + 63) / 64, b_rows = ACROSS ? depth : N;
  const int a_halves = p.t.a_from == 2 ? 0 : halves, b_halves = ACROSS ? (N + 63) / 64 : halves;
  if (thread() == 0) {
    barrier_expect(s.full, (a_halves * 64 + b_halves * b_rows) * 128);
    for (int h = 0; h < a_halves; ++h) load_box(s.a[h], p.a, s.full, 64 * h, 0, 0);
    for (int h = 0; h < b_halves; ++h) load_box(s.b[h], p.b, s.full, 64 * h, 0, 0);
  }
  barrier_wait(s.full, 0);
  float d[N / 2] = {};
  uint32_t a[8][4] = {};
  const int row = thread() / 32 * 16 + lane() / 4;
  for (int k = 0; k < p.t.steps; ++k) {
    for (int i = 0; i < 4; ++i) memcpy(&a[k][i], p.t.a + (row + 8 * (i % 2)) * depth + 16 * k + 8 * (i / 2) + lane() % 4 * 2, 4);
  }
  if (p.t.a_from == 2) write_across(s, p.t);
  multiply_fence();
  for (int k = 0; k < p.t.steps; ++k) {
    const uint64_t a_at = p.t.a_from == 2 ? across_rows(shared_address(s.a) + k * 2048, 0)
                                          : along_rows(shared_address(s.a[k / 4]) + k % 4 * 32);
    const uint64_t b_at = ACROSS ? across_rows(shared_address(s.b[0]) + k * 2048, sizeof(s.b[0]))
                                 : along_rows(shared_address(s.b[k / 4]) + k % 4 * 32);
    if (p.t.a_from == 2) multiply<T, N, ACROSS, true>(d, a_at, b_at, k > 0);
    else if (p.t.a_from == 1) multiply<T, N, ACROSS>(d, (const uint32_t*)a[k], b_at, k > 0);
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

// Blocks take turns, the last one first: it stores a number, the others add theirs. `d` is full of NaN: the number to wait for, too.
struct Turn { bool fence = true, wait = true, global = true, read = true, early = false, done = true, twice = false; int behind = 0; };
inline void take_turn(const Parameters& p, Turn t) {
  struct Numbers { alignas(16) float x[64]; };
  Numbers& s = shared<Numbers>();
  if (thread() != 0) return;
  constexpr int kNan = 0x7fc00000;
  const float values[3] = {-1e8f, 1.0f, 1e8f};
  int* turn = reinterpret_cast<int*>(p.t.d + 1024);
  for (float& x : s.x) shared_store(&x, values[block() % 3]);
  if (t.fence) async_fence();
  const int before = blocks() - 1 - block();
  if (t.wait) wait_at_least(turn, kNan + before + t.behind);
  if (t.global) global_fence();
  for (int i = 0; i < (t.twice ? 2 : 1); ++i) {
    if (before == 0) store_bytes(p.t.d, s.x, sizeof(s.x));
    else add_floats(p.t.d, s.x, sizeof(s.x));
    stores_commit();
  }
  if (t.early) raise(turn);
  if (t.read) stores_read();
  shared_store(&s.x[7], 0.0f);
  if (t.done) stores_wait();
  raise(turn);
}
inline void turns_kernel(const Parameters& p) { take_turn(p, {}); }

// ------------------------------------------------------------------------------------------------------------- kernels that are wrong

struct Wrong {
  const char* name;
  void (*kernel)(const Parameters&);
  int blocks = 1;
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
    {"a source of stores that they do not see", [](const Parameters& p) { Turn t; t.fence = false; take_turn(p, t); }},
    {"a source of stores overwritten", [](const Parameters& p) { Turn t; t.read = false; take_turn(p, t); }},
    {"a store not waited for", [](const Parameters& p) { Turn t; t.done = false; take_turn(p, t); }},
    {"two stores to one place", [](const Parameters& p) { Turn t; t.twice = true; take_turn(p, t); }},
    {"a turn that never comes", [](const Parameters& p) { Turn t; t.behind = 1; take_turn(p, t); }, 2},
    {"a turn not waited for", [](const Parameters& p) { Turn t; t.wait = false; take_turn(p, t); }, 2},
    {"a turn that copies know nothing of", [](const Parameters& p) { Turn t; t.global = false; take_turn(p, t); }, 2},
    {"a turn given away too early", [](const Parameters& p) { Turn t; t.early = true; take_turn(p, t); }, 2},
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
  int blocks = 1;
  const auto choose = [&](auto element, auto n) {
    using T = decltype(element);
    return t.across ? product_kernel<T, n(), true> : product_kernel<T, n(), false>;
  };
  const auto with_n = [&](auto element) {
    if (t.n == 32) return choose(element, std::integral_constant<int, 32>{});
    return t.n == 64 ? choose(element, std::integral_constant<int, 64>{}) : choose(element, std::integral_constant<int, 128>{});
  };
  if (name == "plain") kernel = plain_kernel;
  if (name == "turns") kernel = turns_kernel, blocks = 3;
  if (name == "product") kernel = DType(t.dtype) == DType::bf16 ? with_n(bf16_t{}) : with_n(f16_t{});
  for (const Wrong& w : kWrong) {
    if (name == w.name) kernel = w.kernel, blocks = w.blocks;
  }
  check(kernel != nullptr, "no self-test is called ", name);
  launch(kernel, p, blocks, 128, sizeof(Tiles), nullptr);
}

}  // namespace longvita::selftest
