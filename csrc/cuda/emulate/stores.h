// The emulator's copies from shared to global memory, and the order between blocks.
//
// A store reads its source and writes when its thread waits for that, and then only when nobody can go on without it. Two stores to one
// place must be ordered: the later one's thread knows, through raise() and wait_at_least(), that the earlier one is done, and has told the
// copy engine so (global_fence). So every thread has clocks: of each other thread, how many stores are done that this one's accesses to
// global memory, or its stores, come after.
#pragma once
#include "multiply.h"

namespace longvita::emulate {

inline int number_of(const Fiber& f) { return f.block->index * 1024 + f.thread; }

inline void merge(Clock& into, const Clock& from) {
  for (auto& [thread, stores] : from) into[thread] = std::max(into[thread], stores);
}

inline void issue_store(char* to, uint32_t address, uint32_t bytes, bool add) {
  require(address % 16 == 0 && uintptr_t(to) % 16 == 0 && bytes % 16 == 0 && bytes > 0,
          "cp.async.bulk: addresses and size are multiples of 16");
  check_global(to, bytes, 16, true);
  check_pieces(address, bytes, "a store reads", true);
  Fiber& f = self();
  const uintptr_t begin = uintptr_t(to), end = begin + bytes;
  for (auto& [at, store] : grid.stored) {
    if (at >= end || store.end <= begin) continue;
    require(!store.under_way, "a store to global memory to which another one is under way");
    const auto known = f.stores_after.find(store.thread);
    require(known != f.stores_after.end() && known->second >= store.number,
            "a store out of turn: nothing says that it comes after that of block ", store.thread / 1024, ", thread ", store.thread % 1024);
  }
  grid.stored[begin] = {end, number_of(f), ++f.stores_issued, true};
  for (uint32_t piece = 0; piece < bytes / 16; ++piece) ++block().leaving[(address - kSharedStart) / 16 + piece];
  f.stores.push_back({to, at(address), bytes, add, {}});
}

inline void commit_stores() { self().committed_stores = self().stores.size(); }

inline void read_store(Fiber& f, Store& s) {
  if (!s.read.empty()) return;
  s.read.assign(s.from, s.from + s.bytes);
  for (uint32_t piece = 0; piece < s.bytes / 16; ++piece) --f.block->leaving[(s.from - f.block->memory) / 16 + piece];
}

inline void finish_store(Fiber& f, Store& s) {
  for (uint32_t i = 0; i < s.bytes; i += 4) {
    float value, before;
    memcpy(&value, &s.read[i], 4), memcpy(&before, s.to + i, 4);
    if (s.add) value += before;
    memcpy(s.to + i, &value, 4);
  }
  Stored& stored = grid.stored[uintptr_t(s.to)];
  stored.under_way = false;
  f.accesses_after[number_of(f)] = f.stores_after[number_of(f)] = stored.number;
}

// Waits until all committed stores have read their sources; `done`: until they are done.
inline void wait_for_stores(bool done) {
  Fiber& f = self();
  if (f.committed_stores == 0) return;
  block().copies.push_back({[&f, done] {
    for (size_t i = 0; i < f.committed_stores; ++i) read_store(f, f.stores[i]);
    for (; done && f.committed_stores > 0; --f.committed_stores, f.stores.pop_front()) finish_store(f, f.stores.front());
    ++f.store_gate.passed;
  }});
  wait(f.store_gate, done ? "its stores to be done" : "its stores to read");
}

}  // namespace longvita::emulate
