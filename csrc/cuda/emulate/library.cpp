// The Hopper kernels on the emulator as a plain C library, for ctypes: tests/cuda/emulated.py builds and calls it.
//   g++ -std=c++17 -O3 -fPIC -shared -DLV_EMULATE -I csrc/include -I csrc/cuda -x c++ csrc/cuda/emulate/library.cpp
#include "attention_forward.cu"
#include "attention_backward.cu"
#include "emulate/selftest.h"

using namespace longvita;
using namespace longvita::cuda;

namespace {

std::string message;

template <class F> int caught(F f) {            // 0: done; 1: refused (the caller's mistake); 2: the emulator found the kernel wrong
  try {
    f();
    return 0;
  } catch (const std::invalid_argument& e) {
    message = e.what();
    return 1;
  } catch (const std::exception& e) {
    message = e.what();
    return 2;
  }
}

}  // namespace

extern "C" {

const char* lv_message() { return message.c_str(); }

void lv_settings(int multiprocessors, uint32_t seed) {
  emulate::settings.multiprocessors = multiprocessors, emulate::settings.seed = seed;
  emulate::regions.clear();
}

// Global memory that kernels may read, and write if `writable`.
void lv_allow(uintptr_t begin, int64_t bytes, int writable) {
  emulate::regions.push_back({begin, begin + uintptr_t(bytes), writable != 0});
}

struct Tensor {                 // (tokens, heads, dim), strides in elements
  uintptr_t data;
  int64_t tokens, heads, dim, stride_token, stride_head;
};

struct Problem {
  int64_t dtype, result;
  Tensor q, k, v;
  uintptr_t cu_q, cu_k;
  int64_t docs;
  double scale, softcap;
  int64_t left, right;
};

}  // extern "C"

namespace {

Rows3 rows(const Tensor& t) { return {reinterpret_cast<char*>(t.data), t.tokens, t.heads, t.dim, t.stride_token, t.stride_head}; }

AttentionProblem problem(const Problem& c) {
  AttentionProblem p;
  p.dtype = DType(c.dtype), p.result = DType(c.result), p.q = rows(c.q), p.k = rows(c.k), p.v = rows(c.v);
  p.cu_q = reinterpret_cast<const int32_t*>(c.cu_q), p.cu_k = reinterpret_cast<const int32_t*>(c.cu_k), p.docs = c.docs;
  p.scale = c.scale, p.softcap = c.softcap, p.left = c.left, p.right = c.right;
  return p;
}

}  // namespace

extern "C" {

int lv_cannot(const Problem* c) {
  return caught([&] { message = attention_cannot(problem(*c)); });
}

int64_t lv_scratch(const Problem* c, int backward, int single_pass) {
  return attention_scratch(problem(*c), backward != 0, single_pass != 0);
}

int lv_forward(const Problem* c, const Tensor* out, float* lse, float* lse_rest, void* scratch, int64_t scratch_bytes) {
  return caught([&] { attention_forward({problem(*c), rows(*out), lse, lse_rest, scratch, scratch_bytes}, nullptr); });
}

// strides: of lse by head and token, of grad_lse by head and token.
int lv_backward(const Problem* c, const Tensor* out, const Tensor* grad_out, const float* lse, const float* lse_rest, const float* grad_lse,
                const int64_t* strides, const Tensor* grads, int add, int single_pass, void* scratch, int64_t scratch_bytes) {
  return caught([&] {
    AttentionBackward b;
    b.p = problem(*c), b.out = rows(*out), b.grad_out = rows(*grad_out), b.lse = lse, b.lse_rest = lse_rest, b.grad_lse = grad_lse;
    b.lse_stride_head = strides[0], b.lse_stride_token = strides[1];
    b.grad_lse_stride_head = strides[2], b.grad_lse_stride_token = strides[3];
    b.grad_q = rows(grads[0]), b.grad_k = rows(grads[1]), b.grad_v = rows(grads[2]);
    b.add = add != 0, b.single_pass = single_pass != 0, b.scratch = scratch, b.scratch_bytes = scratch_bytes;
    attention_backward(b, nullptr);
  });
}

int lv_selftest(const char* name, const selftest::SelfTest* t) {
  return caught([&] { selftest::run(name, *t); });
}

}  // extern "C"
