// The kernels on a CPU, for tests: every thread of a block is a fiber, and whatever lanes or threads do together
// (matrix products, shuffles, barriers) waits until all of them are there. Found out and reported: threads that wait for
// each other at different places or for ever. The order in which threads run between two meetings is MEDFAST_ORDER in
// the environment (0: warp by warp, 1: the same backwards, else all of them shuffled by that seed): a result that depends
// on it lacks a barrier. Shared memory starts as NaN in every block and is followed by a guard.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#include <ucontext.h>

#define HOST_DEVICE
#define DEVICE inline
#define __global__
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define SHARED_MEMORY(name) unsigned char* const name = emulated::block->shared.data()
#define threadIdx (emulated::block->index())
#define blockIdx (emulated::block->position)
#define blockDim (emulated::block->size)

struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { uint32_t x, y; };
struct alignas(8) int2 { int x, y; };

namespace emulated {

struct X { unsigned x; };

struct Thread {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(64 * 1024);
  bool done = false;
  const char* waits_for = nullptr;  // null: it runs
  void* brought = nullptr;
};

struct Block {
  static constexpr size_t kGuard = 256;
  X position, size;
  std::vector<unsigned char> shared;
  std::vector<Thread> threads;
  std::vector<int> order;
  bool warps_apart = true;  // each runs as far as it gets before the next one starts
  size_t current = 0;
  std::string error;
  ucontext_t scheduler;
  const std::function<void()>* body;
  X index() const { return {unsigned(current)}; }

  void yield() { swapcontext(&threads[current].context, &scheduler); }
  [[noreturn]] void fail(const std::string& message) {
    error = message;
    yield();
    std::abort();
  }
  // All of the group (a warp, or the block) meet here; the last to come does the work for all of them.
  template <class Work>
  void meet(const char* name, bool whole_block, void* brings, const Work& work) {
    const size_t first = whole_block ? 0 : current / 32 * 32, count = whole_block ? threads.size() : 32;
    Thread* const group = threads.data() + first;
    Thread& self = threads[current];
    self.waits_for = name, self.brought = brings;
    for (size_t i = 0; i < count; ++i) {
      if (group[i].done) fail(std::string("a thread has left while others wait for ") + name);
      if (!group[i].waits_for) return yield();
      if (group[i].waits_for != name) {
        if (whole_block) return yield();  // its warp may have to meet first
        fail(std::string("lanes of one warp wait for ") + name + " and for " + group[i].waits_for);
      }
    }
    work(group);
    for (size_t i = 0; i < count; ++i) group[i].waits_for = nullptr;
  }
};

inline thread_local Block* block = nullptr;

inline void enter() {
  (*block->body)();
  block->threads[block->current].done = true;
  block->yield();
}

inline int order_seed() {
  const char* asked = std::getenv("MEDFAST_ORDER");
  return asked ? std::atoi(asked) : 0;
}

inline std::vector<int> thread_order(int count, int seed) {
  std::vector<int> order(count);
  for (int i = 0; i < count; ++i) order[i] = seed == 1 ? count - 1 - i : i;
  if (seed > 1) std::shuffle(order.begin(), order.end(), std::mt19937(seed));
  return order;
}

inline void run_block(Block& now) {
  block = &now;
  for (Thread& thread : now.threads) {
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.data();
    thread.context.uc_stack.ss_size = thread.stack.size();
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, enter, 0);
    thread.done = false, thread.waits_for = nullptr;
  }
  const size_t all = now.order.size(), stretch = now.warps_apart ? 32 : all;
  for (bool moved = true; moved && now.error.empty();) {
    moved = false;
    for (size_t first = 0; first < all; first += stretch)
      for (bool again = true; again;) {
        again = false;
        for (size_t i = first; i < first + stretch && now.error.empty(); ++i) {
          Thread& thread = now.threads[now.order[i]];
          if (thread.done || thread.waits_for) continue;
          now.current = now.order[i], moved = again = true;
          swapcontext(&now.scheduler, &thread.context);
        }
      }
  }
  block = nullptr;
  for (const Thread& thread : now.threads)
    if (now.error.empty() && !thread.done) now.error = std::string("threads wait for ever, one of them for ") + thread.waits_for;
  for (size_t i = now.shared.size() - Block::kGuard; i < now.shared.size(); ++i)
    if (now.shared[i] != 0xff && now.error.empty()) now.error = "something was written beyond shared memory";
  if (!now.error.empty()) throw std::runtime_error("emulated block " + std::to_string(now.position.x) + ": " + now.error);
}

inline void run(int64_t blocks, int threads, size_t shared, const std::function<void()>& body) {
  Block now;
  now.size = {unsigned(threads)}, now.threads.resize(threads), now.body = &body;
  now.order = thread_order(threads, order_seed()), now.warps_apart = order_seed() < 2;
  for (int64_t i = 0; i < blocks; ++i) {
    now.position = {unsigned(i)};
    now.shared.assign(shared + Block::kGuard, 0xff);
    run_block(now);
  }
}

template <class T>
T& brought(Thread& thread) { return *static_cast<T*>(thread.brought); }

template <class T, class Work>
void exchange(const char* name, T& mine, bool whole_block, const Work& work) {
  block->meet(name, whole_block, &mine, [&](Thread* group) {
    std::vector<T> all(whole_block ? block->threads.size() : 32);
    for (size_t i = 0; i < all.size(); ++i) all[i] = brought<T>(group[i]);
    work(all);
    for (size_t i = 0; i < all.size(); ++i) brought<T>(group[i]) = all[i];
  });
}

struct Product { float c[4]; uint32_t a[4], b[2]; };

// Where PTX puts the elements of mma.m16n8k16: a (row, k), b (k, column), c (row, column).
template <class T>
void multiply(std::vector<Product>& lanes) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 8; ++i) {
      const float2 pair = T::unpack(lanes[lane].a[i / 2]);
      a[lane / 4 + 8 * (i / 2 % 2)][2 * (lane % 4) + i % 2 + 8 * (i / 4)] = i % 2 ? pair.y : pair.x;
    }
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) {
      const float2 pair = T::unpack(lanes[lane].b[i / 2]);
      b[2 * (lane % 4) + i % 2 + 8 * (i / 2)][lane / 4] = i % 2 ? pair.y : pair.x;
    }
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i)
      for (int k = 0; k < 16; ++k) lanes[lane].c[i] += a[lane / 4 + 8 * (i / 2)][k] * b[k][2 * (lane % 4) + i % 2];
}

template <class Stored>
struct Element {
  static uint32_t pack(float low, float high) { return uint32_t(Stored(high).x) << 16 | Stored(low).x; }
  static float2 unpack(uint32_t packed) {
    return {float(Stored(uint16_t(packed), Stored::from_bits())), float(Stored(uint16_t(packed >> 16), Stored::from_bits()))};
  }
  static void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    Product mine{{c[0], c[1], c[2], c[3]}, {a[0], a[1], a[2], a[3]}, {b0, b1}};
    exchange<Product>("mma", mine, false, emulated::multiply<Element>);
    std::copy(mine.c, mine.c + 4, c);
  }
};

struct Matrices { const uint16_t* row; uint32_t to[4]; };

inline void load(uint32_t (&to)[4], const uint16_t* row, bool transposed) {
  if (reinterpret_cast<uintptr_t>(row) % 16) block->fail("ldmatrix from an address that is no multiple of 16");
  Matrices mine{row, {}};
  exchange<Matrices>(transposed ? "ldmatrix.trans" : "ldmatrix", mine, false, [=](std::vector<Matrices>& lanes) {
    for (int lane = 0; lane < 32; ++lane)
      for (int m = 0; m < 4; ++m) {
        const auto at = [&](int i) {
          const int r = lane / 4, c = 2 * (lane % 4) + i;
          return uint32_t(transposed ? lanes[8 * m + c].row[r] : lanes[8 * m + r].row[c]);
        };
        lanes[lane].to[m] = at(1) << 16 | at(0);
      }
  });
  std::copy(mine.to, mine.to + 4, to);
}

}  // namespace emulated

using Half = emulated::Element<c10::Half>;
using Bfloat16 = emulated::Element<c10::BFloat16>;

inline void load_matrices(uint32_t (&to)[4], const uint16_t* row) { emulated::load(to, row, false); }
inline void load_matrices_transposed(uint32_t (&to)[4], const uint16_t* row) { emulated::load(to, row, true); }
inline float exp2_fast(float x) { return std::exp2(x); }
inline float from_lane(float x, int other) {
  emulated::exchange<float>("shuffle", x, false, [=](std::vector<float>& lanes) {
    const std::vector<float> before = lanes;
    for (int i = 0; i < 32; ++i) lanes[i] = before[i ^ other];
  });
  return x;
}
inline uint32_t from_lane_below(uint32_t x, int distance) {
  emulated::exchange<uint32_t>("shuffle up", x, false, [=](std::vector<uint32_t>& lanes) {
    for (int i = 31; i >= distance; --i) lanes[i] = lanes[i - distance];
  });
  return x;
}
inline void sync_warp() { emulated::block->meet("warp barrier", false, nullptr, [](emulated::Thread*) {}); }
inline void sync_block() { emulated::block->meet("block barrier", true, nullptr, [](emulated::Thread*) {}); }
inline bool any_in_block(bool mine) {
  char any = mine;
  emulated::exchange<char>("block or", any, true, [](std::vector<char>& all) {
    std::fill(all.begin(), all.end(), *std::max_element(all.begin(), all.end()));
  });
  return any;
}
inline void count_up(uint32_t* counter) { ++*counter; }
inline float __uint_as_float(uint32_t x) { return std::bit_cast<float>(x); }
inline uint32_t __float_as_uint(float x) { return std::bit_cast<uint32_t>(x); }
using std::max, std::min;
