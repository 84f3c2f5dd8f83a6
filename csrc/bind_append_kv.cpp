#include "append_kv.h"
#include "bind_kv_cache.h"

namespace py = pybind11;
using namespace longvita;

void bind_append_kv(py::module_& m) {
  // k, v: address, strides of token, head and dimension
  m.def("append_kv", [](int dtype, int64_t tokens, uintptr_t k, int64_t k_token, int64_t k_head, int64_t k_dim, uintptr_t v, int64_t v_token,
                        int64_t v_head, int64_t v_dim, int cache_dtype, const py::tuple& cache, const py::tuple& k_side,
                        const py::tuple& v_side, int64_t batch, uintptr_t offsets, uintptr_t lengths, int threads) {
    check(dtype >= 0 && dtype <= 2, "append_kv: expected float32, bfloat16 or float16");
    check(threads > 0, "append_kv: threads must be positive");
    if (tokens == 0) return;
    AppendArgs args;
    args.dtype = DType(dtype);
    args.threads = threads;
    args.cache = kv_cache(cache_dtype, cache, k_side, v_side);
    check((k_dim == 1 && v_dim == 1) || args.cache.dim == 1, "append_kv: the last dimension must be contiguous");
    args.k = rows3(k, args.dtype, tokens, args.cache.heads, args.cache.dim, k_token, k_head, "k");
    args.v = rows3(v, args.dtype, tokens, args.cache.heads, args.cache.dim, v_token, v_head, "v");
    args.sequences = sequences(batch, offsets, lengths, tokens, args.cache, true);
    py::gil_scoped_release release;
    append_kernels().append(args);
  });
}
