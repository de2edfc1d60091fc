// Draws from the one random generator on CPU: words, uniform and normal numbers, distinct ids, stochastic depth.
#include <algorithm>
#include <memory>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "random_kernel.h"
#include "selection.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr float kUnit = 0x1p-24f;

// The counter words (b, 3) of the samples of a draw: sample, step, stream.
struct Draw {
  const Tensor address;
  const Philox philox;
  const RandomKernel& kernel;

  Draw(const Tensor& given, int64_t seed)
      : address(check(given)), philox{uint64_t(seed), static_cast<const int64_t*>(address.const_data_ptr())},
        kernel(MEDFAST_PICK(random_kernel)) {}

  static Tensor check(const Tensor& given) {
    STD_TORCH_CHECK(given.is_cpu(), "this operator runs on CPU tensors");
    STD_TORCH_CHECK(given.scalar_type() == ScalarType::Long && given.dim() == 2 && given.size(1) == 3,
                    "address must be (b, 3) int64: sample, step, stream");
    return torch::stable::contiguous(given);
  }

  int64_t samples() const { return address.size(0); }

  // emit(sample, first, count, words) for every group of every sample, on any thread
  template <class Emit>
  void for_groups(int64_t count, Emit emit) const {
    constexpr int64_t kGrain = 256;  // groups a thread takes at least
    const int64_t groups = (count + kRandomGroup - 1) / kRandomGroup;
    torch::stable::parallel_for(0, samples() * groups, kGrain, [&](int64_t begin, int64_t end) {
      uint32_t words[kRandomGroup];
      for (int64_t item = begin; item < end; ++item) {
        const int64_t sample = item / groups, first = item % groups * kRandomGroup;
        kernel.words(philox, sample, uint32_t(first / 4), words);
        emit(sample, first, std::min<int64_t>(kRandomGroup, count - first), words);
      }
    });
  }
};

template <class T>
T* data(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

Tensor philox_words(Tensor address, int64_t count, int64_t seed) {
  STD_TORCH_CHECK(count >= 0, "count must be at least 0, got ", count);
  const Draw draw(address, seed);
  Tensor out = torch::stable::new_empty(draw.address, {draw.samples(), count});
  int64_t* const to = data<int64_t>(out);
  draw.for_groups(count, [&](int64_t sample, int64_t first, int64_t present, const uint32_t* words) {
    std::copy_n(words, present, to + sample * count + first);
  });
  return out;
}

Tensor random_uniform(Tensor address, int64_t count, int64_t seed) {
  STD_TORCH_CHECK(count >= 0, "count must be at least 0, got ", count);
  const Draw draw(address, seed);
  Tensor out = torch::stable::new_empty(draw.address, {draw.samples(), count}, ScalarType::Float);
  float* const to = data<float>(out);
  draw.for_groups(count, [&](int64_t sample, int64_t first, int64_t present, const uint32_t* words) {
    for (int64_t i = 0; i < present; ++i) to[sample * count + first + i] = float(int32_t(words[i] >> 8)) * kUnit;
  });
  return out;
}

Tensor random_normal(Tensor address, int64_t count, int64_t seed) {
  STD_TORCH_CHECK(count >= 0, "count must be at least 0, got ", count);
  const Draw draw(address, seed);
  Tensor out = torch::stable::new_empty(draw.address, {draw.samples(), count}, ScalarType::Float);
  float* const to = data<float>(out);
  draw.for_groups(count, [&](int64_t sample, int64_t first, int64_t present, const uint32_t* words) {
    float numbers[kRandomGroup];
    draw.kernel.normal(words, numbers);
    std::copy_n(numbers, present, to + sample * count + first);
  });
  return out;
}

Tensor random_keep(Tensor address, double rate, int64_t seed) {
  const Draw draw(address, seed);
  Tensor out = torch::stable::new_empty(draw.address, {draw.samples()}, ScalarType::Bool);
  for (int64_t sample = 0; sample < draw.samples(); ++sample) {
    uint32_t word[4];
    philox_block(draw.philox, sample, 0, word);
    data<bool>(out)[sample] = float(word[0] >> 8) * kUnit >= float(rate);
  }
  return out;
}

// (b, count): the ids whose words are the smallest of n, ascending
Tensor random_ids(Tensor address, int64_t n, int64_t count, int64_t seed) {
  STD_TORCH_CHECK(0 <= count && count <= n, "count must be in [0, n] = [0, ", n, "], got ", count);
  const Draw draw(address, seed);
  Tensor out = torch::stable::new_empty(draw.address, {draw.samples(), count});
  if (count == 0) return out;
  const int64_t grain = std::max<int64_t>(1, 16384 / n);  // samples a thread takes at least
  torch::stable::parallel_for(0, draw.samples(), grain, [&, to = data<int64_t>(out)](int64_t begin, int64_t end) {
    std::vector<uint32_t> keys((n + kRandomGroup - 1) / kRandomGroup * kRandomGroup), spare(n);
    const std::unique_ptr<bool[]> taken(new bool[n]);
    for (int64_t sample = begin; sample < end; ++sample) {
      for (int64_t first = 0; first < n; first += kRandomGroup)
        draw.kernel.words(draw.philox, sample, uint32_t(first / 4), keys.data() + first);
      for (uint32_t& key : keys) key = ~key;  // the smallest word is the largest key
      take_largest(keys.data(), n, count, spare.data(), taken.get());
      int64_t* const ids = to + sample * count;
      for (int64_t id = 0, found = 0; found < count; found += taken[id++]) ids[found] = id;
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(MEDFAST_NAMESPACE, m) {
  m.def("philox_words(Tensor address, int count, int seed) -> Tensor");
  m.def("random_uniform(Tensor address, int count, int seed) -> Tensor");
  m.def("random_normal(Tensor address, int count, int seed) -> Tensor");
  m.def("random_keep(Tensor address, float rate, int seed) -> Tensor");
  m.def("random_ids(Tensor address, int n, int count, int seed) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(MEDFAST_NAMESPACE, CPU, m) {
  m.impl("philox_words", TORCH_BOX(&philox_words));
  m.impl("random_uniform", TORCH_BOX(&random_uniform));
  m.impl("random_normal", TORCH_BOX(&random_normal));
  m.impl("random_keep", TORCH_BOX(&random_keep));
  m.impl("random_ids", TORCH_BOX(&random_ids));
}
