// One call of class attention as plain pointers: what the operator hands to the kernel of an instruction set.
#pragma once

#include <cstdint>

#include "isa.h"

// Rows of dim elements, in elements: row(b, token, head) starts at b * batch + token * token + head * head.
template <class T>
struct ClassRows {
  T* data;
  int64_t batch, token, head;
  T* at(int64_t b, int64_t n, int64_t h) const { return data + b * batch + n * token + h * head; }
};

template <class T>
struct ClassJob {
  int64_t batch, heads, dim, tokens, chunks;  // [CLS] counts as a token; chunks: parts of a sample, for its sums
  T scale;
  ClassRows<const T> q, k, v;
  T* weights;    // (batch, heads, tokens)
  T* attention;  // (batch, tokens - 1)
  T* parts;      // (batch, chunks, heads, dim): of the output, or of the gradient of q
  T* sum;        // (batch, heads, dim): of those over the chunks
  // backward only
  const T *out, *grad_out, *grad_attention;  // grad_out and grad_attention may be null
  T *delta;                                  // (batch, heads)
  T *grad_k, *grad_v;                        // (batch, tokens, heads, dim)

  int64_t first(int64_t chunk) const { return chunk * tokens / chunks; }
};

// In the order of their use. Each makes one item of its range: a chunk of a sample, or a head of a sample.
template <class T>
struct ClassKernel {
  void (*logits)(const ClassJob<T>& job, int64_t sample, int64_t chunk);
  void (*softmax)(const ClassJob<T>& job, int64_t sample, int64_t head);
  void (*values)(const ClassJob<T>& job, int64_t sample, int64_t chunk);
  void (*delta)(const ClassJob<T>& job, int64_t sample, int64_t head);  // backward
  void (*backward)(const ClassJob<T>& job, int64_t sample, int64_t chunk);
  void (*add_parts)(const ClassJob<T>& job, int64_t sample, int64_t head);  // both
};

MEDFAST_KERNEL(ClassKernel<float>, class_float);
MEDFAST_KERNEL(ClassKernel<double>, class_double);
