// Masks from attention on CPU: two selections over one row of keys, one pass that writes the mask, one its indices.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "philox.h"
#include "selection.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

template <class T>
using Key = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;

// A key that orders as the attention does: NaN ranks with what is never attended, -0 equals 0.
template <class T>
Key<T> key_of(T attention, bool low) {
  constexpr Key<T> sign = Key<T>(1) << (8 * sizeof(T) - 1);
  T value = (low ? -attention : attention) + T(0);
  if (std::isnan(value)) value = -std::numeric_limits<T>::infinity();
  Key<T> bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits & sign ? ~bits : bits | sign;
}

struct Job {
  int64_t n, count, top, shown;
  bool low;
  const int64_t *counts, *shown_counts;  // (b) or null: in place of count and shown
  const int64_t* address;                // (b, 3) or null: all of the top are shown again
  Philox philox;
};

template <class T>
struct Row {
  const Job& job;
  std::vector<Key<T>> keys, spare;
  std::vector<int32_t> top;                // the most attended, ascending, and room for one more
  std::vector<uint32_t> lots, lots_spare;  // of those
  const std::unique_ptr<bool[]> taken;

  explicit Row(const Job& job)
      : job(job), keys(job.n), spare(job.n), top(job.top + 1), lots(job.top), lots_spare(job.top),
        taken(new bool[job.n]) {}

  void mask(int64_t sample, const T* attention, bool* where) {
    const int64_t n = job.n, count = job.counts ? std::clamp<int64_t>(job.counts[sample], 0, n) : job.count;
    for (int64_t i = 0; i < n; ++i) keys[i] = key_of(attention[i], job.low);
    take_largest(keys.data(), n, count, spare.data(), where);
    if (job.top) show(sample, where);
  }

  void show(int64_t sample, bool* where) {
    take_largest(keys.data(), job.n, job.top, spare.data(), taken.get());
    for (int64_t i = 0, found = 0; found < job.top; found += taken[i++]) top[found] = int32_t(i);
    const int64_t shown = job.shown_counts ? std::clamp<int64_t>(job.shown_counts[sample], 0, job.top) : job.shown;
    if (job.address) draw(sample);  // without, all of them are shown, whatever their lots
    take_largest(lots.data(), job.top, shown, lots_spare.data(), taken.get());
    for (int64_t j = 0; j < job.top; ++j) where[top[j]] &= !taken[j];
  }

  void draw(int64_t sample) {  // number i of the draw belongs to token i; the smallest are the largest lots
    uint32_t word[4];
    int32_t block = -1;
    for (int64_t j = 0; j < job.top; ++j) {
      if (top[j] / 4 != block) philox_block(job.philox, sample, uint32_t(block = top[j] / 4), word);
      lots[j] = ~word[top[j] % 4];
    }
  }
};

// Without branches until one list is full, for which way a token goes cannot be foreseen; the others are of the other.
void write_ids(const bool* where, int64_t n, int64_t* hidden, int64_t hidden_count, int64_t* visible) {
  int64_t i = 0, on = 0, off = 0;
  for (; on < hidden_count && off < n - hidden_count; ++i) {
    hidden[on] = visible[off] = i;
    on += where[i], off += !where[i];
  }
  int64_t* next = on < hidden_count ? hidden + on : visible + off;
  for (; i < n; ++i) *next++ = i;
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> masks(const Tensor& attention, const Job& job, bool ids) {
  const int64_t batch = attention.size(0), n = job.n, hidden_count = job.count - job.shown;
  Tensor where = torch::stable::new_empty(attention, {batch, n}, ScalarType::Bool);
  Tensor hidden = torch::stable::new_empty(attention, {batch, ids ? hidden_count : 0}, ScalarType::Long);
  Tensor visible = torch::stable::new_empty(attention, {batch, ids ? n - hidden_count : 0}, ScalarType::Long);
  const T* const from = static_cast<const T*>(attention.const_data_ptr());
  bool* const mask = static_cast<bool*>(where.mutable_data_ptr());
  int64_t* const on = static_cast<int64_t*>(hidden.mutable_data_ptr());
  int64_t* const off = static_cast<int64_t*>(visible.mutable_data_ptr());
  const int64_t grain = std::max<int64_t>(1, 8192 / std::max<int64_t>(1, n));  // rows a thread takes at least
  torch::stable::parallel_for(0, batch, grain, [&](int64_t begin, int64_t end) {
    Row<T> row(job);
    for (int64_t sample = begin; sample < end; ++sample) {
      row.mask(sample, from + sample * n, mask + sample * n);
      if (!ids) continue;
      write_ids(mask + sample * n, n, on + sample * hidden_count, hidden_count, off + sample * (n - hidden_count));
    }
  });
  return {where, hidden, visible};
}

const int64_t* words_of(const std::optional<Tensor>& x) {
  return x ? static_cast<const int64_t*>(x->const_data_ptr()) : nullptr;
}

std::optional<Tensor> dense(const OptionalTensor& x, const char* name, std::vector<int64_t> size) {
  if (!x) return std::nullopt;
  bool fits = x->is_cpu() && x->scalar_type() == ScalarType::Long && x->dim() == int64_t(size.size());
  for (size_t i = 0; fits && i < size.size(); ++i) fits = x->size(i) == size[i];
  STD_TORCH_CHECK(fits, name, " must be int64 on a CPU, (b,) for counts and (b, 3) for draw");
  return torch::stable::contiguous(*x);
}

std::tuple<Tensor, Tensor, Tensor> attention_mask(Tensor attention, bool low, int64_t count, OptionalTensor counts,
                                                  int64_t top, int64_t shown, OptionalTensor shown_counts,
                                                  OptionalTensor draw, int64_t seed) {
  STD_TORCH_CHECK(attention.is_cpu() && attention.dim() == 2, "attention must be (b, n) on a CPU");
  const int64_t batch = attention.size(0), n = attention.size(1);
  STD_TORCH_CHECK(n < std::numeric_limits<int32_t>::max(), "attention has too many tokens: ", n);
  STD_TORCH_CHECK(0 <= count && count <= n && 0 <= top && top <= n && 0 <= shown && shown <= top,
                  "count and top must be in [0, n] and shown in [0, top], got ", count, ", ", top, " and ", shown);
  STD_TORCH_CHECK(counts || top <= count, "only hidden tokens can be shown: top must be at most count = ", count,
                  ", got ", top);
  STD_TORCH_CHECK(draw || (shown == top && !shown_counts), "without a draw all of the top are shown");
  counts = dense(counts, "counts", {batch}), shown_counts = dense(shown_counts, "shown_counts", {batch});
  draw = dense(draw, "draw", {batch, 3}), attention = torch::stable::contiguous(attention);
  const Job job{n,   count, top, shown, low, words_of(counts), words_of(shown_counts), words_of(draw),
                Philox{uint64_t(seed), words_of(draw)}};
  const bool ids = !counts && !shown_counts;  // every sample hides the same number
  if (attention.scalar_type() == ScalarType::Float) return masks<float>(attention, job, ids);
  STD_TORCH_CHECK(attention.scalar_type() == ScalarType::Double, "attention must be float32 or float64");
  return masks<double>(attention, job, ids);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(MEDFAST_NAMESPACE, m) {
  m.def("attention_mask(Tensor attention, bool low, int count, Tensor? counts, int top, int shown, "
        "Tensor? shown_counts, Tensor? draw, int seed) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(MEDFAST_NAMESPACE, CPU, m) { m.impl("attention_mask", TORCH_BOX(&attention_mask)); }
