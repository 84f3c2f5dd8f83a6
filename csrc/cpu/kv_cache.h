// A key/value cache as append_kv and decode_attention see it: (rows, row_size, heads, dim). A row is a sequence, or with a table a block.
#pragma once
#include "longvita/views.h"

namespace longvita {

struct CacheSide {
  char* data = nullptr;
  int64_t stride_row = 0, stride_token = 0, stride_head = 0;
  float* scale = nullptr;      // per token and head; null for a floating-point cache
  int64_t scale_row = 0, scale_token = 0, scale_head = 0;

  int64_t at(int64_t row, int64_t token, int64_t head) const { return row * stride_row + token * stride_token + head * stride_head; }
  float& scale_at(int64_t row, int64_t token, int64_t head) const {
    return scale[row * scale_row + token * scale_token + head * scale_head];
  }
};

struct KvCache {
  DType dtype = DType::f32;
  int64_t rows = 0, row_size = 0, heads = 0, dim = 0;
  const int32_t* table = nullptr;      // (batch, table_columns), or null: row = sequence
  int64_t table_stride = 0, table_columns = 0;
  CacheSide k, v;

  int64_t row(int64_t sequence, int64_t position) const {
    return table == nullptr ? sequence : table[sequence * table_stride + position / row_size];
  }
  int64_t column(int64_t position) const { return table == nullptr ? position : position % row_size; }
};

// Packed queries or new keys of `batch` sequences: tokens offsets[b] to offsets[b + 1]; lengths[b] tokens of cache.
struct Sequences {
  int64_t batch = 0;
  const int32_t *offsets = nullptr, *lengths = nullptr;
};

}  // namespace longvita
