// The bias of window attention on CPU, as the kernels read it and as its gradient is given back.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "window_job.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

template <class T>
T* data(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

// Dense (heads, N, N), or a table (entries, heads) with the entry of each pair of tokens, (N, N) int64.
struct Bias {
  bool given;
  Tensor values, rows;
  const int64_t* entry = nullptr;

  Bias(const OptionalTensor& values_, const OptionalTensor& rows_, int64_t heads, int64_t n)
      : given(values_.has_value()) {
    if (!given) return;
    values = torch::stable::contiguous(*values_);
    if (!rows_) {
      STD_TORCH_CHECK(values.dim() == 3 && values.size(0) == heads && values.size(1) == n && values.size(2) == n,
                      "without rows bias must be (heads, N, N) = (", heads, ", ", n, ", ", n, ")");
      return;
    }
    rows = torch::stable::contiguous(*rows_), entry = data<int64_t>(rows);
    STD_TORCH_CHECK(rows.scalar_type() == ScalarType::Long && rows.numel() == n * n,
                    "rows must be (N, N) int64, N = ", n);
    STD_TORCH_CHECK(values.dim() == 2 && values.size(1) == heads, "with rows bias must be (entries, heads = ", heads,
                    ")");
    const auto [least, most] = std::minmax_element(entry, entry + n * n);
    STD_TORCH_CHECK(*least >= 0 && *most < values.size(0), "rows must be in [0, ", values.size(0), ")");
  }
  int64_t at(int64_t head, int64_t heads, int64_t pair, int64_t n) const {
    return entry ? entry[pair] * heads + head : head * n * n + pair;
  }
};

// A score as a power of two. One that is finite stays so: masks are made of the lowest number there is.
template <class T>
T power_of_two(T score) {
  const T power = T(kLog2E) * score, most = std::numeric_limits<T>::max();
  return std::isfinite(score) ? std::clamp(power, -most, most) : score;
}

// The bias in powers of two. For the backward rows are padded to whole vectors with -inf, so that no key beyond the
// window is ever attended.
template <class T>
std::vector<T> bias_rows(const Bias& bias, int64_t heads, int64_t n, int64_t stride, bool transposed) {
  std::vector<T> rows(heads * n * stride, T(0));
  for (int64_t h = 0; h < heads; ++h)
    for (int64_t i = 0; i < n; ++i) {
      T* row = rows.data() + (h * n + i) * stride;
      if (bias.given)
        for (int64_t j = 0; j < n; ++j) {
          const int64_t query = transposed ? j : i, key = transposed ? i : j;
          row[j] = power_of_two(data<T>(bias.values)[bias.at(h, heads, query * n + key, n)]);
        }
      if (!transposed) std::fill(row + n, row + stride, -std::numeric_limits<T>::infinity());
    }
  return rows;
}

// sum over chunks, in their order, of `rows` rows of `from` elements, of which the first `to` count
template <class T>
void add_chunks(const T* parts, int64_t chunks, int64_t rows, int64_t from, int64_t to, T* sum) {
  torch::stable::parallel_for(0, rows, 1024, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = 0; chunk < chunks; ++chunk)
      for (int64_t r = begin; r < end; ++r)
        for (int64_t c = 0; c < to; ++c) sum[r * to + c] += parts[(chunk * rows + r) * from + c];
  });
}

}  // namespace
