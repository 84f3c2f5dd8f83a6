// A machine for kernels on a CPU: the threads of its blocks are fibers of one thread, which run until they must wait.
//
// It is strict where hardware is silent. Everything asynchronous happens as late as it may: a copy arrives when nobody can go on without
// it, a wgmma reads its operands when somebody waits for it, a store its source likewise (stores.h). What nobody may touch meanwhile is
// NaN: shared memory that was never written or is being copied to, accumulators of a wgmma under way. A kernel that breaks a rule ends with an
// Error that says which thread broke which rule; a kernel in which all wait ends with what each waits for. With a seed, threads and copies
// run in another order.
#pragma once
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "../sm90.cuh"

namespace longvita::emulate {

struct Error : std::runtime_error { using std::runtime_error::runtime_error; };

inline std::string words() { return {}; }
template <class X, class... More>
std::string words(const X& x, const More&... more) {
  if constexpr (std::is_arithmetic_v<X>) return std::to_string(x) + words(more...);
  else return std::string(x) + words(more...);
}

// ------------------------------------------------------------------------------------------------------------------- settings, memory

struct Settings {
  int multiprocessors = 2;      // blocks that run at a time
  uint32_t seed = 0;            // 0: threads in turn, copies as late as possible; else both at random
};
inline Settings settings;

// Global memory that kernels may touch.
struct Region { uintptr_t begin, end; bool writable; };
inline std::vector<Region> regions;

// ---------------------------------------------------------------------------------------------------------------------------- threads

struct Block;

using Clock = std::map<int, uint64_t>;  // of threads: how many of their stores are done

struct Store {                          // a copy from shared to global memory
  char* to;
  const char* from;
  uint32_t bytes;
  bool add;
  std::vector<char> read;               // what it has read, if it has
};

// Something that several threads wait for: everybody who waits goes on when `passed` changes.
struct Gate { uint64_t passed = 0; };

struct Fiber {
  int thread = 0;
  Block* block = nullptr;
  jmp_buf state;
  bool started = false, finished = false;
  const Gate* gate = nullptr;           // waits for it to pass, if it is not null
  uint64_t passed = 0;                  // what `gate->passed` was then
  const char* waits_for = "";
  uint64_t detail = 0;
  char* stack = nullptr;
  std::vector<uint32_t> unfenced;       // pieces of shared memory that it wrote since its last async_fence
  std::deque<Store> stores;             // under way
  size_t committed_stores = 0;          // of these
  uint64_t stores_issued = 0;
  Gate store_gate;
  Clock accesses_after, stores_after;   // the stores that its accesses to global memory, and its own stores, come after
};

struct Barrier {                        // an mbarrier
  int64_t count = 0, missing = 0, bytes = 0;
  Gate phase;
  bool ready = false;                   // barriers_ready() came after its initialisation
};

struct Meeting {                        // of the lanes of a warp, or at a named barrier
  int here = 0, expected = 0;
  const char* purpose = nullptr;
  Gate gate;
};

struct Accumulator {                    // registers of a warp that wgmmas under way add to
  float* lane[32];
  int columns = 0, under_way = 0;
  std::vector<float> values;            // 16 × columns
};

struct Product {                        // one wgmma of one warp
  std::shared_ptr<Accumulator> to;
  DType dtype;
  bool add, across, across_a, a_in_registers;
  uint64_t a, b;
  const uint32_t* a_at[32];
  uint32_t a_values[32][4];
};

struct Brought {                        // what a lane gives to a wgmma
  float* d;
  const uint32_t* registers;
  uint64_t a, b;
  bool add;
};

struct Warp {
  Meeting meeting;
  Brought brought[32];
  uint32_t slots[2][32];                // values that lanes exchange
  bool fenced = false;
  std::vector<Product> open;
  std::deque<std::vector<Product>> committed;
};

struct Copy { std::function<void()> arrive; };

struct Block {
  int index = 0, threads = 0;
  char* memory = nullptr;               // shared memory
  uint32_t bytes = 0;
  std::vector<uint8_t> arriving;        // of every piece of 16 bytes: copies under way
  std::vector<int> unfenced;            // and the thread + 1 whose writes are not yet visible to copies and wgmma
  std::vector<uint8_t> leaving;         // and how many stores have yet to read it
  std::map<uint32_t, Barrier> barriers; // by address
  Meeting named[16];
  std::vector<Warp> warps;
  std::deque<Copy> copies;
  int registers_given = 0;
};

struct Stored { uintptr_t end; int thread; uint64_t number; bool under_way; };
struct Signal {                         // a number that blocks wait for
  Gate gate;
  Clock known;                          // to those who raised it
};

struct Grid {
  int blocks = 0;
  std::vector<std::unique_ptr<Block>> running;
  std::vector<std::unique_ptr<Fiber>> fibers;
  Fiber* self = nullptr;
  jmp_buf scheduler;
  ucontext_t context;
  const std::function<void()>* kernel = nullptr;
  std::map<uintptr_t, Stored> stored;   // by the address: the last store to it
  std::map<const int*, Signal> signals;
  std::string error;
  std::mt19937 random;
};
inline Grid grid;

inline Fiber& self() { return *grid.self; }
inline Block& block() { return *grid.self->block; }
inline Warp& warp() { return block().warps[self().thread / 32]; }

constexpr size_t kStack = 256 << 10;
constexpr uint32_t kSharedStart = 1024;         // the address of a block's first byte of shared memory

// Ends the kernel; never returns. (No fiber has anything to destroy that matters: the machine throws away all of them.)
[[noreturn]] inline void fail(const std::string& what) {
  grid.error = words("block ", block().index, ", thread ", self().thread, ": ", what);
  _longjmp(grid.scheduler, 2);
}
template <class... Parts>
void require(bool ok, const Parts&... parts) {
  if (!ok) fail(words(parts...));
}

// Lets others run until the gate passes.
inline void wait(const Gate& gate, const char* what, uint64_t detail = 0) {
  Fiber& f = self();
  f.gate = &gate, f.passed = gate.passed, f.waits_for = what, f.detail = detail;
  if (_setjmp(f.state) == 0) _longjmp(grid.scheduler, 1);
}

inline void begin() {
  try {
    (*grid.kernel)();
  } catch (const std::exception& e) {
    grid.error = e.what();
    _longjmp(grid.scheduler, 2);
  }
  self().finished = true;
  _longjmp(grid.scheduler, 1);
}

// Runs a fiber until it waits or ends. False: the kernel has failed.
inline bool resume(Fiber& f) {
  grid.self = &f;
  f.gate = nullptr;
  const int why = _setjmp(grid.scheduler);
  if (why == 0) {
    if (f.started) _longjmp(f.state, 1);
    f.started = true;
    getcontext(&grid.context);
    grid.context.uc_stack.ss_sp = f.stack, grid.context.uc_stack.ss_size = kStack, grid.context.uc_link = nullptr;
    makecontext(&grid.context, begin, 0);
    setcontext(&grid.context);
  }
  return why == 1;
}

inline std::string who_waits() {
  std::map<std::string, int> waiting;
  for (auto& f : grid.fibers) {
    if (!f->finished) ++waiting[words("block ", f->block->index, ", warp ", f->thread / 32, " waits for ", f->waits_for, " ", f->detail)];
  }
  std::string text = "deadlock:";
  for (auto& [what, threads] : waiting) text += words("\n  ", what, " (", threads, " threads)");
  for (auto& b : grid.running) {
    for (auto& [address, barrier] : b->barriers) {
      if (barrier.missing != barrier.count || barrier.bytes != 0)
        text += words("\n  block ", b->index, ", barrier ", address, ": phase ", barrier.phase.passed, " misses ", barrier.missing,
                      " arrivals and ", barrier.bytes, " bytes");
    }
  }
  return text;
}

// One of the copies under way arrives, in the order of their issue or (seeded) any.
inline bool deliver() {
  for (auto& b : grid.running) {
    if (b->copies.empty()) continue;
    const size_t which = settings.seed ? grid.random() % b->copies.size() : 0;
    Copy copy = std::move(b->copies[which]);
    b->copies.erase(b->copies.begin() + which);
    copy.arrive();
    return true;
  }
  return false;
}

// Every fiber that can run does, once; false if the kernel failed or nobody can go on.
inline bool turn(bool& all_finished) {
  bool ran = false;
  all_finished = true;
  const bool random = settings.seed != 0;
  uint64_t sleeping = random ? (uint64_t(grid.random()) << 32 | grid.random()) : 0;      // warps that sit this turn out
  for (auto& f : grid.fibers) {
    if (f->finished) continue;
    all_finished = false;
    if (f->gate && f->gate->passed == f->passed) continue;
    if (random && (sleeping >> (f->block->index * 12 + f->thread / 32) % 64 & 1)) {
      ran = true;
      continue;
    }
    ran = true;
    if (!resume(*f)) return false;
  }
  if (random && grid.random() % 4 == 0) ran |= deliver();
  return ran || all_finished || deliver();
}

inline std::unique_ptr<Block> new_block(int index, int threads, uint32_t bytes) {
  auto b = std::make_unique<Block>();
  b->index = index, b->threads = threads, b->bytes = bytes;
  b->memory = static_cast<char*>(aligned_alloc(1024, std::max<size_t>(1024, (bytes + 1023) / 1024 * 1024)));
  memset(b->memory, 0xff, bytes);
  b->arriving.assign(bytes / 16 + 1, 0), b->unfenced.assign(bytes / 16 + 1, 0), b->leaving.assign(bytes / 16 + 1, 0);
  b->warps.resize((threads + 31) / 32);
  return b;
}

// Runs blocks [first, last) of the grid to their end.
inline void run_blocks(int first, int last, int threads, uint32_t bytes) {
  static std::vector<char*> stacks;             // kept: mapping them anew for every launch takes longer than small kernels
  grid.running.clear(), grid.fibers.clear();
  for (int i = first; i < last; ++i) {
    grid.running.push_back(new_block(i, threads, bytes));
    for (int t = 0; t < threads; ++t) {
      auto f = std::make_unique<Fiber>();
      const size_t n = grid.fibers.size();
      if (n == stacks.size()) {
        void* stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (stack == MAP_FAILED) throw Error("no memory for the stacks of threads");
        stacks.push_back(static_cast<char*>(stack));
      }
      f->thread = t, f->block = grid.running.back().get(), f->stack = stacks[n];
      grid.fibers.push_back(std::move(f));
    }
  }
  bool finished = false, alive = true;
  while (alive && !finished) alive = turn(finished);
  if (!alive && grid.error.empty()) grid.error = who_waits();
  for (auto& f : grid.fibers) {
    if (grid.error.empty() && !f->stores.empty())
      grid.error = words("block ", f->block->index, ", thread ", f->thread, ": the thread ended with a store under way");
  }
  for (auto& b : grid.running) {
    for (auto& w : b->warps) {
      if (grid.error.empty() && (!w.open.empty() || !w.committed.empty()))
        grid.error = words("block ", b->index, ": a warp ended with a wgmma under way");
    }
    if (grid.error.empty() && !b->copies.empty()) grid.error = words("block ", b->index, ": the block ended with a copy under way");
    free(b->memory);
  }
  grid.running.clear(), grid.fibers.clear();
  if (!grid.error.empty()) throw Error(grid.error);
}

inline void launch(const std::function<void()>& kernel, int blocks, int threads, uint32_t bytes) {
  grid.blocks = blocks, grid.kernel = &kernel, grid.error.clear(), grid.stored.clear(), grid.signals.clear();
  grid.random.seed(settings.seed);
  for (int first = 0; first < blocks; first += settings.multiprocessors)
    run_blocks(first, std::min(blocks, first + settings.multiprocessors), threads, bytes);
}

}  // namespace longvita::emulate
