#include "bind_kv_cache.h"
#include "decode_attention.h"

namespace py = pybind11;
using namespace longvita;

namespace {

// (tokens, query heads), head dimension: the cache's
DecodeArgs arguments(int dtype, std::array<int64_t, 2> size, int cache_dtype, const CacheArgs& cache, const SideArgs& k, const SideArgs& v,
                     int64_t batch, uintptr_t offsets, uintptr_t lengths, bool causal, std::array<int64_t, 2> window, int threads) {
  check(dtype >= 0 && dtype <= 2, "decode_attention: expected float32, bfloat16 or float16");
  check(threads > 0, "decode_attention: threads must be positive");
  DecodeArgs args;
  args.dtype = DType(dtype);
  args.cache = kv_cache(cache_dtype, cache, k, v);
  args.q.tokens = size[0], args.q.heads = size[1], args.q.dim = args.cache.dim;
  check(size[0] > 0 && size[1] > 0 && size[1] % args.cache.heads == 0, "decode_attention: query heads must be a multiple of the cache's");
  args.sequences = sequences(batch, offsets, lengths, size[0], args.cache, false);
  args.causal = causal;
  args.window_left = window[0], args.window_right = window[1];
  args.threads = threads;
  return args;
}

}  // namespace

void bind_decode_attention(py::module_& m) {
  m.def("decode_attention_scratch",
        [](int dtype, std::array<int64_t, 2> size, int cache_dtype, CacheArgs cache, SideArgs k, SideArgs v, int64_t batch,
           uintptr_t offsets, uintptr_t lengths, bool causal, std::array<int64_t, 2> window, int threads) {
          return decode_kernels().scratch(
              arguments(dtype, size, cache_dtype, cache, k, v, batch, offsets, lengths, causal, window, threads));
        },
        "floats of scratch that decode_attention needs for the same problem");
  m.def("decode_attention",
        [](int dtype, std::array<int64_t, 2> size, int cache_dtype, CacheArgs cache, SideArgs k, SideArgs v, int64_t batch,
           uintptr_t offsets, uintptr_t lengths, bool causal, std::array<int64_t, 2> window, int threads, float softcap,
           float softmax_scale, uintptr_t q, std::array<int64_t, 2> q_stride, uintptr_t out, uintptr_t lse, uintptr_t scratch,
           int64_t scratch_size) {
          DecodeArgs args = arguments(dtype, size, cache_dtype, cache, k, v, batch, offsets, lengths, causal, window, threads);
          const int64_t tokens = size[0], heads = size[1], dim = args.cache.dim;
          args.softcap = softcap, args.softmax_scale = softmax_scale;
          args.q = rows3(q, args.dtype, tokens, heads, dim, q_stride[0], q_stride[1], "q");
          args.out = rows3(out, args.dtype, tokens, heads, dim, heads * dim, dim, "out");
          args.lse = pointer<float>(lse, tokens * heads, "lse");
          args.scratch = pointer<float>(scratch, scratch_size, "scratch");
          args.scratch_size = scratch_size;
          py::gil_scoped_release release;
          decode_kernels().run(args);
        });
}
