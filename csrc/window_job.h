// One call of window attention as plain pointers: what the operator hands to the kernel of an instruction set.
#pragma once

#include <cstdint>

#include "isa.h"
#include "philox.h"

constexpr double kLog2E = 1.44269504088896340736;  // 1 / ln 2: scores are exponents of two

template <class T>
struct WindowJob {
  int64_t batch, heads, dim;
  int64_t windows;      // of one sample
  int64_t tokens;       // N, of one window
  int64_t grid_tokens;  // of one sample
  const int32_t* source;  // (windows, N) token of the grid, -1 for padding
  const float* region;    // (windows, N): tokens see each other if their regions are equal
  const uint8_t* masked;  // (windows): more than one region inside
  const T* qkv;           // (batch, grid_tokens, 3, heads, dim)
  const T* bias;          // (heads, N, stride of N) / ln 2: keys x queries; backward queries x keys, -inf beyond N
  const T* scale;         // (heads)
  const T* pad_value;     // (3, heads, dim)
  const bool* keep;       // (batch) or null
  bool cosine;
  double dropout;
  Philox philox;
  T* out;  // (batch, grid_tokens, heads, dim)
  T* softmax;  // (batch, windows, heads, 2, N): of each query the highest score / ln 2, and 1 / the sum of exponentials
  // backward only
  const T* grad_out;
  T* grad_qkv;
  T* grad_bias;   // (chunks, heads, N, stride of N) or null; need not be zeroed
  T* grad_pad;    // (chunks, heads, 3, dim)
  T* grad_scale;  // (chunks, heads)
};

// A chunk is a range of windows, and of heads that one thread computes. Ranges of windows are a function of the shape
// alone, so that sums over them come out bit for bit the same on any number of threads.
struct Chunk {
  int64_t index, begin, end, head_begin, head_end;
};

template <class T>
struct WindowKernel {
  int64_t lanes;                                                            // stride of N is a multiple of it
  int64_t (*scratch)(int64_t tokens, int64_t dim);                          // elements of T that a call needs
  void (*forward)(const WindowJob<T>& job, const Chunk& chunk, T* scratch);  // scratch: zeroed, 64-byte aligned
  void (*backward)(const WindowJob<T>& job, const Chunk& chunk, T* scratch);
};

MEDFAST_KERNEL(WindowKernel<float>, window_float);
MEDFAST_KERNEL(WindowKernel<double>, window_double);
