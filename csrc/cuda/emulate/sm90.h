// The names of sm90.cuh as functions of the emulator: what each instruction does by the PTX ISA, and the rules it checks.
#pragma once
#include <cmath>
#include <cstdint>

#define LV_DEVICE inline
#define LV_KERNEL(threads) void
#define LV_PARAMETERS(Type) const Type&
#define LV_UNROLL

#include "machine.h"
#include "multiply.h"
#include "stores.h"

namespace longvita::sm90 {

using emulate::require;

// ---------------------------------------------------------------------------------------------------------------- threads and numbers

inline int thread() { return emulate::self().thread; }
inline int block() { return emulate::block().index; }
inline int blocks() { return emulate::grid.blocks; }

inline float float_of_bits(uint32_t bits) { return emulate::cast<float>(bits); }
inline uint32_t bits_of_float(float x) { return emulate::cast<uint32_t>(x); }
inline float fused(float a, float b, float c) { return std::fmaf(a, b, c); }
inline float maximum(float a, float b) { return std::fmaxf(a, b); }
inline float exp2(float x) {
  const float y = std::exp2f(x);
  return y < 1.17549435e-38f ? 0.0f : y;        // subnormal results are flushed
}
inline float log2(float x) { return std::log2f(x); }

template <class T> uint32_t pack(float low, float high) { return emulate::round<T>(low) | uint32_t(emulate::round<T>(high)) << 16; }
template <class T> float widen(uint32_t bits) { return emulate::widen<T>(uint16_t(bits)); }

// ------------------------------------------------------------------------------------------------------------- memory and its threads

template <class S> S& shared() {
  require(sizeof(S) <= emulate::block().bytes, "shared memory of ", emulate::block().bytes, " bytes; the kernel uses ", sizeof(S));
  return *reinterpret_cast<S*>(emulate::block().memory);
}

inline uint32_t shared_address(const void* at) {
  const emulate::Block& b = emulate::block();
  const int64_t offset = static_cast<const char*>(at) - b.memory;
  require(offset >= 0 && offset < b.bytes, "an address ", offset, " bytes into shared memory of ", b.bytes);
  return emulate::kSharedStart + uint32_t(offset);
}

template <class T> T shared_load(const T* at) {
  emulate::check_pieces(shared_address(at), sizeof(T), "reads", false);
  return *at;
}
template <class T> void shared_store(T* at, const T& value) {
  const uint32_t address = shared_address(at);
  require(address % alignof(T) == 0, "a store to shared memory at ", address, ", not aligned to ", alignof(T));
  emulate::check_pieces(address, sizeof(T), "writes", false);
  emulate::check_unread(address, sizeof(T), "writes");
  emulate::mark_unfenced(address, sizeof(T));
  *at = value;
}
inline int shared_add(int* at, int value) {
  const int before = shared_load(at);
  *at += value;
  return before;
}

template <class T> T global_load(const T* at) {
  emulate::check_global(at, sizeof(T), alignof(T), false);
  return *at;
}
template <class T> void global_store(T* at, const T& value) {
  emulate::check_global(at, sizeof(T), alignof(T), true);
  *at = value;
}
inline int global_add(int* at, int value) {
  emulate::check_global(at, sizeof(int), alignof(int), true);
  const int before = *at;
  *at += value;
  return before;
}

inline void wait_at_least(const int* at, int value) {
  emulate::check_global(at, sizeof(int), alignof(int), false);
  emulate::Signal& signal = emulate::grid.signals[at];
  while (*at < value) emulate::wait(signal.gate, "a number in global memory to be at least", uint64_t(value));
  emulate::merge(emulate::self().accesses_after, signal.known);
}
inline void raise(int* at) {
  emulate::check_global(at, sizeof(int), alignof(int), true);
  emulate::Signal& signal = emulate::grid.signals[at];
  emulate::merge(signal.known, emulate::self().accesses_after);
  ++*at, ++signal.gate.passed;
}

inline void named_arrive(int id, int threads) {
  emulate::Meeting& m = emulate::block().named[id];
  require(id >= 0 && id < 16 && threads % 32 == 0, "named barrier ", id, " of ", threads, " threads");
  require(m.here == 0 || m.expected == threads, "named barrier ", id, ": ", threads, " threads expected here, ", m.expected, " elsewhere");
  m.expected = threads;
  if (++m.here == threads) m.here = 0, ++m.gate.passed;
}
inline void named_sync(int id, int threads) {
  emulate::Meeting& m = emulate::block().named[id];
  const uint64_t before = m.gate.passed;
  named_arrive(id, threads);
  if (m.gate.passed == before) emulate::wait(m.gate, "named barrier", id);
}
inline void block_sync() { named_sync(0, emulate::block().threads); }

inline void warp_sync() { emulate::meet("warp_sync"); }
inline uint32_t shuffle_xor(uint32_t x, int mask) { return emulate::exchange(x, thread() % 32 ^ mask); }
inline float shuffle_xor(float x, int mask) { return float_of_bits(shuffle_xor(bits_of_float(x), mask)); }
inline int shuffle(int x, int source) { return int(emulate::exchange(uint32_t(x), source)); }
inline uint32_t warp_match(int x) {
  uint32_t all[32], same = 0;
  emulate::exchange_all(uint32_t(x), all);
  for (int l = 0; l < 32; ++l) same |= uint32_t(all[l] == uint32_t(x)) << l;
  return same;
}
inline int ones(uint32_t bits) { return __builtin_popcount(bits); }
inline bool warp_any(bool x) {
  bool any = false;
  uint32_t all[32];
  emulate::exchange_all(x, all);
  for (uint32_t y : all) any |= y != 0;
  return any;
}

inline void async_fence() {
  emulate::Fiber& f = emulate::self();
  for (uint32_t piece : f.unfenced) {
    if (emulate::block().unfenced[piece] == f.thread + 1) emulate::block().unfenced[piece] = 0;
  }
  f.unfenced.clear();
}

inline void global_fence() { emulate::merge(emulate::self().stores_after, emulate::self().accesses_after); }

// Every thread that multiplies or loads changes its number once: what all of them ask for must be there.
template <int N> void registers_change() {
  static_assert(N % 8 == 0 && N >= 24 && N <= 256, "setmaxnreg: a multiple of 8 from 24 to 256");
  emulate::Block& b = emulate::block();
  b.registers_given += N;
  require(b.registers_given <= 65536, "setmaxnreg: more registers than the 65,536 there are");
  emulate::meet("setmaxnreg");
}
template <int N> void registers_give() { registers_change<N>(); }
template <int N> void registers_take() { registers_change<N>(); }

// ------------------------------------------------------------------------------------------------------------------ mbarriers, copies

inline void barrier_init(Barrier& b, int count) {
  const uint32_t address = shared_address(&b);
  require(address % 8 == 0 && count > 0, "mbarrier.init at ", address, " with ", count, " arrivals");
  emulate::Barrier& barrier = emulate::block().barriers[address];
  barrier.count = barrier.missing = count;
}
inline void barriers_ready() {
  for (auto& [address, barrier] : emulate::block().barriers) barrier.ready = true;
}
inline void barrier_arrive(Barrier& b) {
  emulate::Barrier& barrier = emulate::barrier_at(shared_address(&b));
  require(barrier.missing > 0, "one arrival too many at the barrier ", shared_address(&b));
  --barrier.missing;
  emulate::complete(barrier);
}
inline void barrier_expect(Barrier& b, int bytes) {
  emulate::Barrier& barrier = emulate::barrier_at(shared_address(&b));
  barrier.bytes += bytes;
  require(barrier.bytes < 1 << 20, "an mbarrier expects at most 2²⁰ − 1 bytes");
  barrier_arrive(b);
}
inline void barrier_wait(Barrier& b, uint32_t parity) {
  const uint32_t address = shared_address(&b);
  emulate::Barrier& barrier = emulate::barrier_at(address);
  require(parity <= 1, "a parity of ", parity);
  while ((barrier.phase.passed & 1) == parity) emulate::wait(barrier.phase, parity ? "phase 1 of barrier" : "phase 0 of barrier", address);
}

inline void prefetch_map(const TensorMap&) {}

inline void load_box(void* to, const TensorMap& map, Barrier& b, int column, int head, int token) {
  emulate::copy_box(shared_address(to), emulate::box_of(map), shared_address(&b), column, head, token);
}
inline void load_bytes(void* to, const void* from, int bytes, Barrier& b) {
  const uint32_t address = shared_address(to);
  const bool aligned = address % 16 == 0 && uintptr_t(from) % 16 == 0 && bytes % 16 == 0 && bytes > 0;
  require(aligned, "cp.async.bulk: addresses and size are multiples of 16");
  emulate::check_global(from, bytes, 16, false);
  char* target = static_cast<char*>(to);
  emulate::copy(address, bytes, shared_address(&b), [=] { memcpy(target, from, bytes); });
}

inline void store_bytes(void* to, const void* from, int bytes) {
  emulate::issue_store(static_cast<char*>(to), shared_address(from), uint32_t(bytes), false);
}
inline void add_floats(float* to, const float* from, int bytes) {
  emulate::issue_store(reinterpret_cast<char*>(to), shared_address(from), uint32_t(bytes), true);
}
inline void stores_commit() { emulate::commit_stores(); }
inline void stores_read() { emulate::wait_for_stores(false); }
inline void stores_wait() { emulate::wait_for_stores(true); }

inline void store_matrices(void* row, const uint32_t* words) {
  uint32_t rows[32];
  require(shared_address(row) % 16 == 0, "stmatrix: a row at ", shared_address(row), ", not aligned to 16 bytes");
  emulate::exchange_all(shared_address(row), rows);
  for (int i = 0; i < 4; ++i)
    shared_store(reinterpret_cast<uint32_t*>(emulate::at(rows[8 * i + thread() % 32 / 4])) + thread() % 4, words[i]);
}

// ---------------------------------------------------------------------------------------------------------------------------- wgmma

inline void multiply_fence() {
  emulate::meet("wgmma.fence");
  emulate::warp().fenced = true;
}
inline void multiply_commit() {
  if (emulate::meet("wgmma.commit_group")) emulate::commit();
}
template <int N> void multiply_wait() {
  if (emulate::meet("wgmma.wait_group")) emulate::finish(N);
}
template <class T, int N, bool ACROSS, bool ACROSS_A = false, class A> void multiply(float (&d)[N / 2], A a, uint64_t b, bool add) {
  static_assert(N % 8 == 0 && N >= 8 && N <= 256);
  emulate::Product p{};
  p.dtype = std::is_same_v<T, bf16_t> ? DType::bf16 : DType::f16;
  p.add = add, p.across = ACROSS, p.across_a = ACROSS_A, p.b = b, p.a_in_registers = !std::is_same_v<A, uint64_t>;
  const uint32_t* registers = nullptr;
  if constexpr (std::is_same_v<A, uint64_t>) p.a = a;
  else registers = a;
  emulate::issue(p, d, N, registers);
}

}  // namespace longvita::sm90
