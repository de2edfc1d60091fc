// Numbers of the one random generator on CPU, threads over blocks of four.
#include "philox.h"

#include <algorithm>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace {

// (b, count) int64: the first numbers of each sample's draw; address (b, 3): sample, step, stream
torch::stable::Tensor philox_words(torch::stable::Tensor address, int64_t count, int64_t seed) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(address.is_cpu(), "this operator runs on CPU tensors");
  STD_TORCH_CHECK(address.scalar_type() == ScalarType::Long && address.dim() == 2 && address.size(1) == 3,
                  "address must be (b, 3) int64: sample, step, stream");
  STD_TORCH_CHECK(count >= 0, "count must be at least 0, got ", count);
  const torch::stable::Tensor dense = torch::stable::contiguous(address);
  const int64_t samples = dense.size(0), blocks = (count + 3) / 4;
  torch::stable::Tensor out = torch::stable::new_empty(dense, {samples, count});
  const Philox philox{uint64_t(seed), static_cast<const int64_t*>(dense.mutable_data_ptr())};
  int64_t* const words = static_cast<int64_t*>(out.mutable_data_ptr());
  constexpr int64_t kGrain = 4096;  // blocks a thread takes at least
  torch::stable::parallel_for(0, samples * blocks, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t sample = item / blocks, block = item % blocks;
      uint32_t word[4];
      philox_block(philox, sample, uint32_t(block), word);
      const int64_t first = 4 * block, present = std::min<int64_t>(4, count - first);
      for (int64_t i = 0; i < present; ++i) words[sample * count + first + i] = word[i];
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(MEDFAST_NAMESPACE, m) { m.def("philox_words(Tensor address, int count, int seed) -> Tensor"); }

STABLE_TORCH_LIBRARY_IMPL(MEDFAST_NAMESPACE, CPU, m) { m.impl("philox_words", TORCH_BOX(&philox_words)); }
