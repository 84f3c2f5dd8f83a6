#include "bind_kv_cache.h"
#include "decode_attention.h"

namespace py = pybind11;
using namespace longvita;

namespace {

// The arguments, checked once; then the scratch they need, then the run.
struct DecodeProblem : DecodeArgs {
  // Head dimension: the cache's.
  DecodeProblem(int code, uintptr_t q_, int64_t tokens, int64_t heads, int64_t stride_token, int64_t stride_head, int64_t stride_dim,
                int cache_code, const py::tuple& cache_, const py::tuple& k, const py::tuple& v, int64_t batch, uintptr_t offsets,
                uintptr_t lengths, bool causal_, int64_t left, int64_t right, float softcap_, float scale, int threads_) {
    check(code >= 0 && code <= 2, "decode_attention: expected float32, bfloat16 or float16");
    check(threads_ > 0, "decode_attention: threads must be positive");
    dtype = DType(code);
    cache = kv_cache(cache_code, cache_, k, v);
    check(tokens > 0 && heads > 0 && heads % cache.heads == 0, "decode_attention: query heads must be a multiple of the cache's");
    check(stride_dim == 1 || cache.dim == 1, "q: the last dimension must be contiguous");
    q = rows3(q_, dtype, tokens, heads, cache.dim, stride_token, stride_head, "q");
    sequences = longvita::sequences(batch, offsets, lengths, tokens, cache, false);
    causal = causal_, window_left = left, window_right = right, softcap = softcap_, softmax_scale = scale, threads = threads_;
  }

  void run(uintptr_t out_, uintptr_t lse_, uintptr_t buffer, int64_t size) {
    out = rows3(out_, dtype, q.tokens, q.heads, q.dim, q.heads * q.dim, q.dim, "out");
    lse = pointer<float>(lse_, q.tokens * q.heads, "lse");
    DecodeArgs::scratch = pointer<float>(buffer, size, "scratch");
    scratch_size = size;
    py::gil_scoped_release release;
    decode_kernels().run(*this);
  }
};

}  // namespace

void bind_decode_attention(py::module_& m) {
  py::class_<DecodeProblem>(m, "decode_attention_problem", "A call of decode_attention, its arguments checked.")
      .def(py::init<int, uintptr_t, int64_t, int64_t, int64_t, int64_t, int64_t, int, const py::tuple&, const py::tuple&, const py::tuple&,
                    int64_t, uintptr_t, uintptr_t, bool, int64_t, int64_t, float, float, int>())
      .def("scratch", [](const DecodeProblem& p) { return decode_kernels().scratch(p); }, "floats of scratch that it needs")
      .def("run", &DecodeProblem::run);
}
