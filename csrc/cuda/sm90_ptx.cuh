// The names of sm90.cuh as instructions. One function, one instruction (PTX ISA 8.0, sm_90a).
#pragma once
#include <cstdint>

#define LV_DEVICE __device__ __forceinline__
#define LV_KERNEL(threads) __global__ void __launch_bounds__(threads, 1)
#define LV_PARAMETERS(Type) const __grid_constant__ Type
#define LV_UNROLL _Pragma("unroll")

namespace longvita::sm90 {

// ---------------------------------------------------------------------------------------------------------------- threads and numbers

LV_DEVICE int thread() { return int(threadIdx.x); }
LV_DEVICE int block() { return int(blockIdx.x); }
LV_DEVICE int blocks() { return int(gridDim.x); }

LV_DEVICE float float_of_bits(uint32_t bits) { return __uint_as_float(bits); }
LV_DEVICE uint32_t bits_of_float(float x) { return __float_as_uint(x); }
LV_DEVICE float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
LV_DEVICE float maximum(float a, float b) { return fmaxf(a, b); }

// 2^x and log₂ x as the special function unit has them: at most 2 units in the last place, 2^(−∞) = 0, subnormal results are 0.
LV_DEVICE float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
LV_DEVICE float log2(float x) { return ::log2f(x); }

// Two floats rounded to nearest, `low` in the lower half.
template <class T> LV_DEVICE uint32_t pack(float low, float high);
template <> LV_DEVICE uint32_t pack<bf16_t>(float low, float high) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
template <> LV_DEVICE uint32_t pack<f16_t>(float low, float high) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

template <class T> LV_DEVICE float widen(uint32_t bits);       // of the lower 16 bits
template <> LV_DEVICE float widen<bf16_t>(uint32_t bits) { return __uint_as_float(bits << 16); }
template <> LV_DEVICE float widen<f16_t>(uint32_t bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(uint16_t(bits)));
  return x;
}

// ------------------------------------------------------------------------------------------------------------- memory and its threads

extern __shared__ __align__(1024) char lv_shared_memory[];
template <class S> LV_DEVICE S& shared() { return *reinterpret_cast<S*>(lv_shared_memory); }
LV_DEVICE uint32_t shared_address(const void* at) { return uint32_t(__cvta_generic_to_shared(at)); }

template <class T> LV_DEVICE T shared_load(const T* at) { return *at; }
template <class T> LV_DEVICE void shared_store(T* at, const T& value) { *at = value; }
LV_DEVICE int shared_add(int* at, int value) { return atomicAdd(at, value); }
template <class T> LV_DEVICE T global_load(const T* at) { return *at; }
template <class T> LV_DEVICE void global_store(T* at, const T& value) { *at = value; }
LV_DEVICE int global_add(int* at, int value) { return atomicAdd(at, value); }

// A number in global memory by which blocks tell each other how far they are: who has waited for it to be at least `value` sees all that
// the threads which raised it had done and seen before.
LV_DEVICE void wait_at_least(const int* at, int value) {
  int found;
  do {
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(found) : "l"(__cvta_generic_to_global(at)) : "memory");
  } while (found < value);
}
LV_DEVICE void raise(int* at) { asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(__cvta_generic_to_global(at)) : "memory"); }

LV_DEVICE void block_sync() { __syncthreads(); }
LV_DEVICE void warp_sync() { __syncwarp(); }
LV_DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
LV_DEVICE uint32_t shuffle_xor(uint32_t x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
LV_DEVICE int shuffle(int x, int source) { return __shfl_sync(0xffffffffu, x, source); }
LV_DEVICE bool warp_any(bool x) { return __any_sync(0xffffffffu, x); }
LV_DEVICE uint32_t warp_match(int x) { return __match_any_sync(0xffffffffu, x); }       // the lanes that have the same number
LV_DEVICE int ones(uint32_t bits) { return __popc(bits); }

// Named barriers 1 … 15 of a block: complete when `threads` threads have come; `arrive` goes on at once, `sync` waits.
LV_DEVICE void named_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
LV_DEVICE void named_arrive(int id, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

// What this thread wrote to shared memory, made visible to copies and wgmma (the "async proxy") of threads that it then synchronises with.
LV_DEVICE void async_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// What this thread has seen of global memory comes before the copies that it issues from here on. (The other way round nothing is needed:
// a copy's completion is followed by such a fence.)
LV_DEVICE void global_fence() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// Registers a thread of this warpgroup may use from here on. All of its warps execute it; multiples of 8, 24 to 256.
template <int N> LV_DEVICE void registers_give() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)); }
template <int N> LV_DEVICE void registers_take() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)); }

// ------------------------------------------------------------------------------------------------------------------ mbarriers, copies

// A phase is complete when `count` arrivals and all expected bytes have come; then the next begins. Initialised by one thread, then
// barriers_ready() by it, then block_sync() by all.
LV_DEVICE void barrier_init(Barrier& b, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&b)), "r"(count) : "memory");
}
LV_DEVICE void barriers_ready() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
LV_DEVICE void barrier_arrive(Barrier& b) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&b)) : "memory");
}
// Expects `bytes` more in this phase, and arrives.
LV_DEVICE void barrier_expect(Barrier& b, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&b)), "r"(bytes) : "memory");
}
LV_DEVICE bool barrier_passed(uint32_t address, uint32_t parity) {
  uint32_t done;
  asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
               : "=r"(done) : "r"(address), "r"(parity) : "memory");
  return done != 0;
}
// Waits until the phase of this parity (0, 1, 0, … from the first) is complete. A fresh barrier counts as having completed parity 1.
LV_DEVICE void barrier_wait(Barrier& b, uint32_t parity) {
  const uint32_t address = shared_address(&b);
  if (__builtin_expect(barrier_passed(address, parity), true)) return;
  while (!barrier_passed(address, parity)) {
  }
}

LV_DEVICE void prefetch_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<uint64_t>(&map)) : "memory");
}
// One box of a (tokens, heads, dim) tensor, from (token, head, column) on; what lies outside the tensor arrives as zeros, and its bytes
// count for the barrier as well. `to` is aligned to 1,024 bytes.
LV_DEVICE void load_box(void* to, const TensorMap& map, Barrier& b, int column, int head, int token) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];"
      ::"r"(shared_address(to)), "l"(reinterpret_cast<uint64_t>(&map)), "r"(shared_address(&b)), "r"(column), "r"(head), "r"(token)
      : "memory");
}
// `bytes` in a row; both addresses and the number are multiples of 16.
LV_DEVICE void load_bytes(void* to, const void* from, int bytes, Barrier& b) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               ::"r"(shared_address(to)), "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_address(&b)) : "memory");
}

// The other way: `bytes` in a row from shared to global memory, or added to the floats there. Between stores_commit() and stores_read(),
// which waits for all of this thread's, nobody may write where they come from; stores_wait() returns when they are done.
LV_DEVICE void store_bytes(void* to, const void* from, int bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;"
               ::"l"(__cvta_generic_to_global(to)), "r"(shared_address(from)), "r"(bytes) : "memory");
}
LV_DEVICE void add_floats(float* to, const float* from, int bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;"
               ::"l"(__cvta_generic_to_global(to)), "r"(shared_address(from)), "r"(bytes) : "memory");
}
LV_DEVICE void stores_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
LV_DEVICE void stores_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
LV_DEVICE void stores_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// Four matrices of 8 × 8 elements of 16 bits, of which the lanes of a warp have words[0 … 3] as they have parts of an accumulator: lane
// 8·i + r says where row r of matrix i goes, 16 bytes.
LV_DEVICE void store_matrices(void* row, const uint32_t* words) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
               ::"r"(shared_address(row)), "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3]) : "memory");
}

// ---------------------------------------------------------------------------------------------------------------------------- wgmma

// Registers of accumulators and A are the hardware's between the first multiply and the wait: before the first multiply of a batch comes
// multiply_fence(), after its last multiply_commit(); multiply_wait<n>() returns when all but the last n batches are done.
LV_DEVICE void multiply_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
LV_DEVICE void multiply_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> LV_DEVICE void multiply_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }

#define LV_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define LV_16(d, i) LV_4(d, i), LV_4(d, i + 4), LV_4(d, i + 8), LV_4(d, i + 12)
#define LV_32(d, i) LV_16(d, i), LV_16(d, i + 16)
#define LV_NAMES_16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define LV_NAMES_32 LV_NAMES_16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define LV_NAMES_64 LV_NAMES_32 \
  ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
// {accumulators}, A, B, whether to add, signs of A and B (1: as they are), [A transposed,] B transposed
#define LV_SHARED_A(shape, type, names, a, b, add, across, across_a) \
  "{\n.reg .pred p;\nsetp.ne.b32 p, " add ", 0;\nwgmma.mma_async.sync.aligned." shape ".f32." type "." type " {" names "}, " a ", " b \
  ", p, 1, 1, " across_a ", " across ";\n}"
#define LV_REGISTER_A(shape, type, names, a0, a1, a2, a3, b, add, across) \
  "{\n.reg .pred p;\nsetp.ne.b32 p, " add ", 0;\nwgmma.mma_async.sync.aligned." shape ".f32." type "." type " {" names "}, {" a0 "," a1 \
  "," a2 "," a3 "}, " b ", p, 1, 1, " across ";\n}"

template <class T, int N, bool ACROSS, bool ACROSS_A> struct Multiply;

#define LV_MULTIPLY(T, type, N, accumulators, names, r0, r1, r2, r3, r4, r5, r6)                                                      \
  template <bool ACROSS, bool ACROSS_A> struct Multiply<T, N, ACROSS, ACROSS_A> {                                                     \
    static LV_DEVICE void run(float (&d)[N / 2], uint64_t a, uint64_t b, int add) {                                                   \
      asm volatile(LV_SHARED_A("m64n" #N "k16", type, names, r0, r1, r2, r3, r4)                                                      \
                   : accumulators : "l"(a), "l"(b), "r"(add), "n"(int(ACROSS)), "n"(int(ACROSS_A)) : "memory");                       \
    }                                                                                                                                 \
    static LV_DEVICE void run(float (&d)[N / 2], const uint32_t* a, uint64_t b, int add) {                                            \
      asm volatile(LV_REGISTER_A("m64n" #N "k16", type, names, r0, r1, r2, r3, r4, r5, r6)                                            \
                   : accumulators : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(int(ACROSS)) : "memory");       \
    }                                                                                                                                 \
  };
#define LV_MULTIPLY_16(T, type) LV_MULTIPLY(T, type, 32, LV_16(d, 0), LV_NAMES_16, "%16", "%17", "%18", "%19", "%20", "%21", "%22")
#define LV_MULTIPLY_32(T, type) LV_MULTIPLY(T, type, 64, LV_32(d, 0), LV_NAMES_32, "%32", "%33", "%34", "%35", "%36", "%37", "%38")
#define LV_MULTIPLY_64(T, type) \
  LV_MULTIPLY(T, type, 128, LV_32(d, 0) LV_COMMA LV_32(d, 32), LV_NAMES_64, "%64", "%65", "%66", "%67", "%68", "%69", "%70")
#define LV_COMMA ,
LV_MULTIPLY_16(bf16_t, "bf16")
LV_MULTIPLY_16(f16_t, "f16")
LV_MULTIPLY_32(bf16_t, "bf16")
LV_MULTIPLY_32(f16_t, "f16")
LV_MULTIPLY_64(bf16_t, "bf16")
LV_MULTIPLY_64(f16_t, "f16")

// D (64, N) = A (64, 16) · B (16, N) + (add ? D : 0). A: a descriptor (ACROSS_A: across_rows, else along_rows) or four registers a
// thread; B: a descriptor, ACROSS: across_rows, else along_rows.
template <class T, int N, bool ACROSS, bool ACROSS_A = false, class A>
LV_DEVICE void multiply(float (&d)[N / 2], A a, uint64_t b, bool add) {
  Multiply<T, N, ACROSS, ACROSS_A>::run(d, a, b, int(add));
}

}  // namespace longvita::sm90
