#include "append_kv.h"
#include "bind_kv_cache.h"

namespace py = pybind11;
using namespace longvita;

void bind_append_kv(py::module_& m) {
  // k, v: (address, stride of token, stride of head)
  m.def("append_kv", [](int dtype, int64_t tokens, std::array<int64_t, 3> k, std::array<int64_t, 3> v, int cache_dtype, CacheArgs cache,
                        SideArgs k_side, SideArgs v_side, int64_t batch, uintptr_t offsets, uintptr_t lengths, int threads) {
    check(dtype >= 0 && dtype <= 2, "append_kv: expected float32, bfloat16 or float16");
    check(threads > 0, "append_kv: threads must be positive");
    if (tokens == 0) return;
    AppendArgs args;
    args.dtype = DType(dtype);
    args.threads = threads;
    args.cache = kv_cache(cache_dtype, cache, k_side, v_side);
    args.k = rows3(k[0], args.dtype, tokens, args.cache.heads, args.cache.dim, k[1], k[2], "k");
    args.v = rows3(v[0], args.dtype, tokens, args.cache.heads, args.cache.dim, v[1], v[2], "v");
    args.sequences = sequences(batch, offsets, lengths, tokens, args.cache, true);
    py::gil_scoped_release release;
    append_kernels().append(args);
  });
}
