// The emulator's shared memory, copies and wgmma: addresses, swizzles, what is under way.
#pragma once
#include <cmath>

#include "machine.h"

namespace longvita::emulate {

template <class To, class From>
To cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// ---------------------------------------------------------------------------------------------------------------------------- numbers

template <class T> float widen(uint16_t bits);
template <> inline float widen<bf16_t>(uint16_t bits) { return cast<float>(uint32_t(bits) << 16); }
template <> inline float widen<f16_t>(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const float sign = bits >> 15 ? -1.0f : 1.0f;
  if (exponent == 31) return fraction ? NAN : sign * INFINITY;
  return sign * (exponent ? std::ldexp(float(1024 + fraction), exponent - 25) : std::ldexp(float(fraction), -24));
}

// Rounds to nearest, ties to even.
template <class T> uint16_t round(float x);
template <> inline uint16_t round<bf16_t>(float x) {
  const uint32_t bits = cast<uint32_t>(x);
  if (x != x) return 0x7fff;
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
template <> inline uint16_t round<f16_t>(float x) {
  if (x != x) return 0x7fff;
  const uint16_t sign = cast<uint32_t>(x) >> 31 ? 0x8000 : 0;
  const double size = std::fabs(double(x));
  if (size >= 65520.0) return sign | 0x7c00;
  const int exponent = std::max(size > 0 ? std::ilogb(size) : -14, -14);
  const long units = std::lrint(std::ldexp(size, 10 - exponent));      // of the last place; 1024 … 2048 where normal
  if (exponent == -14 && units < 1024) return sign | uint16_t(units);
  return sign | uint16_t((exponent + 14) * 1024 + units);
}

// -------------------------------------------------------------------------------------------------------------------------- memory

inline void check_global(const void* at, size_t bytes, size_t alignment, bool write) {
  const uintptr_t begin = uintptr_t(at);
  require(begin % alignment == 0, "an access to global memory that is not aligned to ", alignment);
  for (const Region& r : regions) {
    if (r.begin <= begin && begin + bytes <= r.end && (r.writable || !write)) return;
  }
  fail(words(write ? "a write" : "a read", " of ", bytes, " bytes outside of global memory"));
}

inline char* at(uint32_t address) { return block().memory + (address - kSharedStart); }

// No copy may be on its way to these bytes; `async`: nor may a thread have written them without an async_fence.
inline void check_pieces(uint32_t address, uint32_t bytes, const char* does, bool async) {
  const Block& b = block();
  const bool inside = address >= kSharedStart && address + bytes <= kSharedStart + b.bytes;
  require(inside, does, " shared memory at ", address, ", outside of the block's");
  for (uint32_t piece = (address - kSharedStart) / 16; piece <= (address - kSharedStart + bytes - 1) / 16; ++piece) {
    require(!b.arriving[piece], does, " shared memory at ", address, " that a copy is on its way to");
    require(!async || !b.unfenced[piece], does, " shared memory at ", address, " that thread ", b.unfenced[piece] - 1,
            " wrote without an async_fence");
  }
}

// Nobody may write where a store comes from before it has read.
inline void check_unread(uint32_t address, uint32_t bytes, const char* does) {
  for (uint32_t piece = (address - kSharedStart) / 16; piece <= (address - kSharedStart + bytes - 1) / 16; ++piece)
    require(!block().leaving[piece], does, " shared memory at ", address, " that a store has not read yet");
}

inline void mark_unfenced(uint32_t address, uint32_t bytes) {
  for (uint32_t piece = (address - kSharedStart) / 16; piece <= (address - kSharedStart + bytes - 1) / 16; ++piece) {
    block().unfenced[piece] = self().thread + 1;
    self().unfenced.push_back(piece);
  }
}

// ------------------------------------------------------------------------------------------------------------------------- meetings

// All lanes of the warp come here, doing the same thing; true for the last of them, who does what is done once a warp.
inline bool meet(const char* purpose) {
  Meeting& m = warp().meeting;
  require(m.here == 0 || m.purpose == purpose, "a warp diverges: one lane is at ", purpose, ", another at ", m.purpose);
  m.purpose = purpose;
  if (++m.here == 32) {
    m.here = 0, ++m.gate.passed;
    return true;
  }
  wait(m.gate, purpose);
  return false;
}

// Values of all lanes. Two sets of slots: who is early at the next exchange must not overwrite what others still read.
inline void exchange_all(uint32_t x, uint32_t* all) {
  uint32_t* slots = warp().slots[warp().meeting.gate.passed & 1];
  slots[self().thread % 32] = x;
  meet("a shuffle");
  memcpy(all, slots, 32 * sizeof(uint32_t));
}
inline uint32_t exchange(uint32_t x, int from) {
  uint32_t all[32];
  exchange_all(x, all);
  return all[from & 31];
}

// ------------------------------------------------------------------------------------------------------------------ barriers, copies

inline Barrier& barrier_at(uint32_t address) {
  const auto found = block().barriers.find(address);
  require(found != block().barriers.end(), "an mbarrier at ", address, " that was never initialised");
  require(found->second.ready, "an mbarrier at ", address, " used before barriers_ready");
  return found->second;
}

inline void complete(Barrier& b) {
  if (b.missing == 0 && b.bytes == 0) b.missing = b.count, ++b.phase.passed;
}

// Puts a copy on its way. Until it arrives the target is NaN.
inline void copy(uint32_t address, uint32_t bytes, uint32_t barrier_address, std::function<void()> move) {
  Block* b = &block();
  barrier_at(barrier_address);
  check_pieces(address, bytes, "a copy overwrites", true);
  check_unread(address, bytes, "a copy overwrites");
  memset(at(address), 0xff, bytes);
  for (uint32_t piece = 0; piece < bytes / 16; ++piece) ++b->arriving[(address - kSharedStart) / 16 + piece];
  b->copies.push_back({[=] {
    move();
    for (uint32_t piece = 0; piece < bytes / 16; ++piece) --b->arriving[(address - kSharedStart) / 16 + piece];
    Barrier& barrier = b->barriers[barrier_address];
    barrier.bytes -= bytes;
    complete(barrier);
  }});
}

// What cuTensorMapEncodeTiled is told, for tensors of rank 3 and 16-bit elements with a swizzle of 128 bytes.
struct Box {
  const char* data;
  uint64_t size[3];             // dim, heads, tokens
  uint64_t stride[2];           // bytes between heads, tokens
  uint32_t rows, columns;       // box: tokens, elements
};
static_assert(sizeof(Box) <= sizeof(sm90::TensorMap));
inline Box box_of(const sm90::TensorMap& map) {
  Box box;
  memcpy(&box, &map, sizeof(Box));
  return box;
}

inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

inline void copy_box(uint32_t to, const Box& box, uint32_t barrier, int column, int head, int token) {
  require(to % 1024 == 0, "a box goes to ", to, ", not aligned to 1,024 bytes");
  const uint32_t row_bytes = box.columns * 2;
  require(row_bytes == 128, "a box of ", row_bytes, " bytes a row; a swizzle of 128 is for rows of 128");
  for (uint32_t r = 0; r < box.rows; ++r) {     // only what lies inside of the tensor is read
    const int64_t t = int64_t(token) + r;
    if (t < 0 || t >= int64_t(box.size[2]) || head < 0 || head >= int64_t(box.size[1])) continue;
    const int64_t bytes = 2 * std::min<int64_t>(box.columns, box.size[0] - column);
    check_global(box.data + t * box.stride[1] + head * box.stride[0] + column * 2, bytes, 2, false);
  }
  char* memory = block().memory;
  const auto within = [](int64_t i, uint64_t size) { return i >= 0 && i < int64_t(size); };
  copy(to, box.rows * row_bytes, barrier, [=] {
    for (uint32_t r = 0; r < box.rows; ++r) {
      for (uint32_t c = 0; c < box.columns; ++c) {
        const int64_t t = int64_t(token) + r, x = int64_t(column) + c;
        const bool inside = within(t, box.size[2]) && within(head, box.size[1]) && within(x, box.size[0]);
        uint16_t value = 0;
        if (inside) memcpy(&value, box.data + t * box.stride[1] + head * box.stride[0] + x * 2, 2);
        memcpy(memory + swizzled(to + r * row_bytes + c * 2) - kSharedStart, &value, 2);
      }
    }
  });
}

// ------------------------------------------------------------------------------------------------------------------------------ wgmma

struct Matrix {                 // a shared-memory descriptor, decoded
  uint32_t start, leading, stride, swizzle;

  explicit Matrix(uint64_t word) {
    start = uint32_t(word & 0x3fff) << 4, leading = uint32_t(word >> 16 & 0x3fff) << 4, stride = uint32_t(word >> 32 & 0x3fff) << 4;
    swizzle = uint32_t(word >> 62);
    require((word & 0x3ff1'c000'c000'c000) == 0, "a matrix descriptor with bits set that mean nothing");
    require((word >> 49 & 7) == 0, "a matrix descriptor with a base offset, which tiles aligned to 1,024 bytes do not have");
    require(swizzle != 1 || (start >> 7 & 7) == 0, "a matrix descriptor starts at ", start, ", inside of the unit its swizzle repeats");
    require(swizzle <= 1, "only no swizzle and 128 bytes are emulated");
  }
  // Where (row of M or N, k) of a K-major operand lies: units of 8 rows × 16 bytes.
  uint32_t along(uint32_t row, uint32_t k) const {
    if (swizzle == 0) return start + row / 8 * stride + k / 8 * leading + row % 8 * 16 + k % 8 * 2;
    return swizzled(start + row / 8 * stride + row % 8 * 128 + k * 2);
  }
  // And of an MN-major one, whose rows in memory are the values of k.
  uint32_t across(uint32_t row, uint32_t k) const {
    if (swizzle == 0) return start + row / 8 * stride + k / 8 * leading + k % 8 * 16 + row % 8 * 2;
    return swizzled(start + row / 64 * leading + k / 8 * stride + k % 8 * 128 + row % 64 * 2);
  }
};

inline float element(DType dtype, const void* at) {
  uint16_t bits;
  memcpy(&bits, at, 2);
  return dtype == DType::bf16 ? widen<bf16_t>(bits) : widen<f16_t>(bits);
}

// What accumulators hold while a wgmma is under way: a signalling NaN, which any arithmetic with it changes into a quiet one.
constexpr uint32_t kPoison = 0x7f80dead;

inline int accumulator_row(int lane, int i) { return lane / 4 + 8 * (i / 2 % 2); }
inline int accumulator_column(int lane, int i) { return 8 * (i / 4) + 2 * (lane % 4) + i % 2; }

inline std::shared_ptr<Accumulator> under_way(const float* registers) {
  for (auto& p : warp().open) if (p.to->lane[31] == registers) return p.to;
  for (auto& group : warp().committed) for (auto& p : group) if (p.to->lane[31] == registers) return p.to;
  return nullptr;
}

// All lanes bring their registers; the last one in puts the product on its way.
inline void issue(Product p, float* d, int columns, const uint32_t* a) {
  Warp& w = warp();
  const int lane = self().thread % 32;
  w.brought[lane] = {d, a, p.a, p.b, p.add};
  require(block().threads % 128 == 0, "wgmma in a block of ", block().threads, " threads, not of whole warpgroups");
  if (!meet("wgmma.mma_async")) return;
  const Brought* lanes = w.brought;
  for (int l = 0; l < 32; ++l)
    require(lanes[l].a == p.a && lanes[l].b == p.b && lanes[l].add == p.add, "lanes of a warp give a wgmma different descriptors");
  require(w.fenced, "a wgmma without a wgmma.fence before it in its batch");
  p.to = under_way(lanes[31].d);
  if (!p.to) {
    p.to = std::make_shared<Accumulator>();
    p.to->columns = columns, p.to->values.resize(16 * columns);
    for (int l = 0; l < 32; ++l) {
      p.to->lane[l] = lanes[l].d;
      for (int i = 0; i < columns / 2; ++i) {
        p.to->values[accumulator_row(l, i) * columns + accumulator_column(l, i)] = lanes[l].d[i];
        lanes[l].d[i] = cast<float>(kPoison);
      }
    }
  }
  require(p.to->columns == columns, "wgmmas of ", columns, " and ", p.to->columns, " columns share an accumulator");
  for (int l = 0; l < 32; ++l) {
    p.a_at[l] = lanes[l].registers;
    if (p.a_in_registers) memcpy(p.a_values[l], lanes[l].registers, 16);
  }
  ++p.to->under_way;
  w.open.push_back(std::move(p));
}

inline void commit() {
  Warp& w = warp();
  w.committed.push_back(std::move(w.open));
  w.open.clear();
  w.fenced = false;
}

// The warp's 16 rows of one product, read from shared memory now.
inline void compute(Product& p) {
  const int columns = p.to->columns, row0 = self().thread / 32 % 4 * 16;
  float a[16][16], b[16][256];
  if (p.a_in_registers) {
    for (int l = 0; l < 32; ++l) {
      for (int i = 0; i < 4; ++i) {
        require(p.a_at[l][i] == p.a_values[l][i], "A registers of lane ", l, " changed while a wgmma was reading them");
        for (int e = 0; e < 2; ++e) {
          const uint16_t bits = uint16_t(p.a_values[l][i] >> 16 * e);
          a[l / 4 + 8 * (i % 2)][8 * (i / 2) + 2 * (l % 4) + e] = element(p.dtype, &bits);
        }
      }
    }
  } else {
    const Matrix matrix(p.a);
    for (int r = 0; r < 16; ++r) {
      for (int k = 0; k < 16; ++k) {
        const uint32_t address = p.across_a ? matrix.across(row0 + r, k) : matrix.along(row0 + r, k);
        if ((p.across_a ? r : k) % 8 == 0) check_pieces(address, 16, "wgmma reads A in", true);
        a[r][k] = element(p.dtype, at(address));
      }
    }
  }
  const Matrix matrix(p.b);
  for (int n = 0; n < columns; ++n) {
    for (int k = 0; k < 16; ++k) {
      const uint32_t address = p.across ? matrix.across(n, k) : matrix.along(n, k);
      if ((p.across ? n : k) % 8 == 0) check_pieces(address, 16, "wgmma reads B in", true);
      b[k][n] = element(p.dtype, at(address));
    }
  }
  for (int r = 0; r < 16; ++r) {
    float* d = &p.to->values[r * columns];
    if (!p.add) std::fill(d, d + columns, 0.0f);
    for (int k = 0; k < 16; ++k) {
      for (int n = 0; n < columns; ++n) d[n] += a[r][k] * b[k][n];
    }
  }
}

// Finishes all batches of the warp but the last `remaining`, and gives accumulators back that nothing adds to any more.
inline void finish(size_t remaining) {
  Warp& w = warp();
  while (w.committed.size() > remaining) {
    std::vector<Product> batch = std::move(w.committed.front());
    w.committed.pop_front();
    for (Product& p : batch) {
      compute(p);
      Accumulator& to = *p.to;
      if (--to.under_way > 0) continue;
      for (int l = 0; l < 32; ++l) {
        for (int i = 0; i < to.columns / 2; ++i) {
          require(cast<uint32_t>(to.lane[l][i]) == kPoison, "accumulators of lane ", l, " changed while a wgmma was adding to them");
          to.lane[l][i] = to.values[accumulator_row(l, i) * to.columns + accumulator_column(l, i)];
        }
      }
    }
  }
}

}  // namespace longvita::emulate
