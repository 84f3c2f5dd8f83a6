// Python arguments → KvCache, checked: every position that the sequences reach must lie inside the cache.
#pragma once
#include <pybind11/pybind11.h>

#include <array>

#include "kv_cache.h"

namespace longvita {

// (address, stride of row, token, head, scale address or 0, its three strides)
using SideArgs = std::array<int64_t, 8>;
// (rows, row_size, heads, dim, table address or 0, table stride, table columns)
using CacheArgs = std::array<int64_t, 7>;

// A tuple of N ints. pybind11's own conversion to an array takes several times longer, which a tiny call feels.
template <size_t N>
std::array<int64_t, N> numbers(const pybind11::tuple& tuple) {
  check(tuple.size() == N, "cache: expected tuples of ", int64_t(N), " numbers, got ", int64_t(tuple.size()));
  std::array<int64_t, N> out;
  for (size_t i = 0; i < N; ++i) {
    out[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple.ptr(), Py_ssize_t(i)));
    if (out[i] == -1 && PyErr_Occurred() != nullptr) throw pybind11::error_already_set();
  }
  return out;
}

inline CacheSide cache_side(const SideArgs& a, DType dtype, const char* name) {
  for (int i : {1, 2, 3, 5, 6, 7}) check(a[i] >= 0, name, ": strides must not be negative");
  check(a[0] != 0, name, ": null pointer");
  check(uint64_t(a[0]) % dtype_size(dtype) == 0, name, ": pointer not aligned to its element type");
  check((a[4] != 0) == (dtype_size(dtype) == 1), name, ": scales go with an 8-bit cache, and only with it");
  return {reinterpret_cast<char*>(a[0]), a[1], a[2], a[3], reinterpret_cast<float*>(a[4]), a[5], a[6], a[7]};
}

inline KvCache kv_cache(int dtype, const pybind11::tuple& sizes, const pybind11::tuple& k, const pybind11::tuple& v) {
  const CacheArgs a = numbers<7>(sizes);
  check(dtype >= 0 && dtype <= 4, "cache: expected float32, bfloat16, float16, int8 or float8_e4m3fn");
  check(a[0] > 0 && a[1] > 0 && a[2] > 0 && a[3] > 0, "cache: sizes must be positive");
  check(a[4] == 0 || (a[5] >= 0 && a[6] > 0), "cache: block_table sizes must be positive");
  KvCache cache;
  cache.dtype = DType(dtype);
  cache.rows = a[0], cache.row_size = a[1], cache.heads = a[2], cache.dim = a[3];
  cache.table = reinterpret_cast<const int32_t*>(a[4]);
  cache.table_stride = a[5], cache.table_columns = a[6];
  cache.k = cache_side(numbers<8>(k), cache.dtype, "k_cache");
  cache.v = cache_side(numbers<8>(v), cache.dtype, "v_cache");
  return cache;
}

// appended: lengths count the tokens before the new ones (append_kv), otherwise all of them (decode_attention).
// In the words of ops/_cache.py, which checks where these kernels do not run.
inline Sequences sequences(int64_t batch, uintptr_t offsets, uintptr_t lengths, int64_t tokens, const KvCache& cache, bool appended) {
  check(batch > 0, "sequences: batch must be positive");
  Sequences s{batch, pointer<const int32_t>(offsets, batch + 1, "cu_seqlens_q"), pointer<const int32_t>(lengths, batch, "cache_seqlens")};
  check(cache.table != nullptr || cache.rows == batch, "cache: expected one row per sequence");
  const int64_t capacity = cache.table == nullptr ? cache.row_size : cache.row_size * cache.table_columns;
  check(s.offsets[0] == 0, "cu_seqlens_q starts at ", s.offsets[0], "; expected 0");
  check(s.offsets[batch] == tokens, "cu_seqlens_q ends at ", s.offsets[batch], " but there are ", tokens,
        " tokens; its last entry must be the number of tokens");
  for (int64_t b = 0; b < batch; ++b) {
    check(s.offsets[b] <= s.offsets[b + 1], "cu_seqlens_q falls from ", s.offsets[b], " to ", s.offsets[b + 1], " at index ", b + 1,
          "; document offsets must not decrease");
  }
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t fresh = int64_t(s.offsets[b + 1]) - s.offsets[b], first = appended ? s.lengths[b] : 0;
    const int64_t end = int64_t(s.lengths[b]) + (appended ? fresh : 0);
    if (s.lengths[b] < 0 || end > capacity) {
      const std::string length = std::to_string(s.lengths[b]);
      const std::string what = appended ? length + " tokens in the cache and " + std::to_string(fresh) + " new ones" : "length " + length;
      check(false, "cache_seqlens: sequence ", b, " has ", what, ", but its cache holds 0 to ", capacity, "; use a larger cache or more blocks");
    }
    if (cache.table == nullptr || end == first) continue;
    for (int64_t i = first / cache.row_size; i <= (end - 1) / cache.row_size; ++i) {
      const int32_t block = cache.table[b * cache.table_stride + i];
      check(block >= 0 && block < cache.rows, "block_table: sequence ", b, " uses block ", block, "; expected 0 to ", cache.rows - 1);
    }
  }
  return s;
}

}  // namespace longvita
