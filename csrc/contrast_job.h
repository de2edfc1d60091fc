// One call of the token-wise contrast as plain pointers: what the operator hands to the kernel of an instruction set.
#pragma once

#include <cstdint>
#include <type_traits>

#include "isa.h"

template <class T>
struct ContrastJob {
  using Int = typename std::conditional<sizeof(T) == 4, int32_t, int64_t>::type;  // compared in lanes: as wide as T
  int64_t tokens, dim, positions;  // tokens: 2 views x volumes x positions, in this order
  int64_t anchor_begin, anchor_end;  // of view 0; those of view 1 lie tokens / 2 further
  const T* z;                        // (tokens, dim)
  // Columns are padded to whole panels of tokens. Kernels fill these: tokens in lanes, and rows in whole vectors.
  T* panels;                         // (panels, dim, panel width)
  T* rows;                           // (columns, wide), backward only, null forward
  T* square;                         // (panels) largest |z|^2, NaN where one is not finite
  const Int *position, *volume;      // (columns); position -1 beyond the last token
  T inverse_temperature, factor, offset;  // logit = s, or factor * s + offset at the same position of another volume
  bool weighted;                     // some logit is not s
  bool running;                      // running maximum, or one fixed shift
  T shift;                           // no logit is larger
  T* lse;                            // (columns) log of the sum of exponentials, +inf where no anchor
  T* loss;                           // (tokens) of each anchor; forward only, the rest of them backward only
  const T* inverse_sum;              // (columns) exp(shift - lse), not with a running maximum
  T scale;                           // of the gradient
  T* grad;                           // (tokens, dim)
};

template <class T>
struct ContrastKernel {
  int64_t block, panel, lanes;  // rows of one call; columns of a panel; rows are padded to whole vectors
  int64_t (*scratch)(int64_t dim);  // elements of T that a call needs, 64-byte aligned
  void (*pack)(const ContrastJob<T>& job, int64_t panel);
  void (*forward)(const ContrastJob<T>& job, int64_t begin, int64_t end, T* scratch);  // anchors of one view
  void (*backward)(const ContrastJob<T>& job, int64_t begin, int64_t end, T* scratch);
};

MEDFAST_KERNEL(ContrastKernel<float>, contrast_float);
MEDFAST_KERNEL(ContrastKernel<double>, contrast_double);
