// Views of int16 boxes on CPU, into memory that is there: window, turn, resize, blur, gain, shift, contrast, gamma, noise.
#include <algorithm>
#include <cmath>
#include <memory>
#include <optional>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "augment_kernel.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

enum Number { kBlur, kGain, kShift, kContrast, kGamma, kNoise, kNumbers };  // columns of `numbers`
constexpr int64_t kTransposed = 1, kMirrored[3] = {2, 4, 8};                // bits of a turn
constexpr int64_t kVoxels = 1 << 17;                                        // that a thread takes at least

Tensor rows(const Tensor& x, ScalarType type, int64_t count, int64_t columns, const char* what) {
  STD_TORCH_CHECK(x.is_cpu() && x.scalar_type() == type && x.dim() == 2 && x.size(0) == count && x.size(1) == columns,
                  what, " must be (m, ", columns, ") on a CPU");
  return torch::stable::contiguous(x);
}

// Gaussian weights, cut at three standard deviations
std::vector<float> gaussian(float sigma) {
  if (!(sigma > 0.0f)) return {1.0f};
  const int64_t radius = int64_t(std::ceil(3.0 * double(sigma)));
  std::vector<double> weights;
  double total = 0.0;
  for (int64_t k = -radius; k <= radius; ++k) {
    weights.push_back(std::exp(-0.5 * (double(k) / double(sigma)) * (double(k) / double(sigma))));
    total += weights.back();
  }
  std::vector<float> found;
  for (const double weight : weights) found.push_back(float(weight / total));
  return found;
}

// The box of `view`, extent as it is stored, turned: axes exchanged, then mirrored
void turn(AugmentView& view, int64_t bits) {
  if (bits & kTransposed) std::swap(view.step[1], view.step[2]), std::swap(view.extent[1], view.extent[2]);
  for (int axis = 0; axis < 3; ++axis)
    if (bits & kMirrored[axis]) {
      view.box += (view.extent[axis] - 1) * view.step[axis];
      view.step[axis] = -view.step[axis];
    }
}

void run(const AugmentView& view) {
  const AugmentKernel& kernel = MEDFAST_PICK(augment_kernel);
  const int64_t depth = view.size[0], count = depth * view.plane(), bytes = kernel.scratch(view) + 64;
  std::vector<double> sums(depth);
  torch::stable::parallel_for(0, depth, std::max<int64_t>(1, kVoxels / view.plane()), [&](int64_t first, int64_t last) {
    const std::unique_ptr<char[]> memory(new char[bytes]());
    char* const aligned = memory.get() + (64 - reinterpret_cast<uintptr_t>(memory.get()) % 64);
    kernel.place(view, first, last, aligned, sums.data());
  });
  if (view.contrast == 1.0f && view.gamma == 1.0f && view.noise == 0.0f) return;
  double total = 0.0;
  for (const double sum : sums) total += sum;
  torch::stable::parallel_for(0, count, kVoxels, [&](int64_t first, int64_t last) {
    kernel.finish(view, float(total / double(count)), first, last);
  });
}

// out (m, *size) fp32. boxes (m, d, h, w) int16, any strides. extent (m, 4): voxels of each box that count, and its turn.
// numbers (m, 6): columns of Number. address (m, 3): of the noise, None without.
void augment(Tensor out, Tensor boxes, Tensor extent, Tensor numbers, double low, double high,
             std::optional<Tensor> address, int64_t seed) {
  STD_TORCH_CHECK(out.is_cpu() && out.scalar_type() == ScalarType::Float && out.dim() == 4 && out.is_contiguous(),
                  "out must be a contiguous (m, d, h, w) fp32 tensor on a CPU");
  const int64_t count = out.size(0);
  STD_TORCH_CHECK(boxes.is_cpu() && boxes.scalar_type() == ScalarType::Short && boxes.dim() == 4 &&
                  boxes.size(0) == count, "boxes must be (m, d, h, w) int16 on a CPU");
  extent = rows(extent, ScalarType::Long, count, 4, "extent");
  numbers = rows(numbers, ScalarType::Float, count, kNumbers, "numbers");
  if (address) address = rows(*address, ScalarType::Long, count, 3, "address");
  for (int64_t i = 0; i < count; ++i) {
    const int64_t* const given = static_cast<const int64_t*>(extent.const_data_ptr()) + 4 * i;
    const float* const number = static_cast<const float*>(numbers.const_data_ptr()) + kNumbers * i;
    const std::vector<float> weights = gaussian(number[kBlur]);
    AugmentView view{};
    view.box = static_cast<const int16_t*>(boxes.const_data_ptr()) + i * boxes.stride(0);
    view.out = static_cast<float*>(out.mutable_data_ptr()) + i * out.stride(0);
    for (int axis = 0; axis < 3; ++axis) {
      STD_TORCH_CHECK(given[axis] >= 1 && given[axis] <= boxes.size(axis + 1), "extent must be within the boxes");
      view.step[axis] = boxes.stride(axis + 1), view.extent[axis] = given[axis], view.size[axis] = out.size(axis + 1);
    }
    turn(view, given[3]);
    view.low = float(low), view.scale = float(1.0 / (high - low));
    view.gain = number[kGain], view.shift = number[kShift], view.contrast = number[kContrast];
    view.gamma = number[kGamma], view.noise = address ? number[kNoise] : 0.0f;
    view.weights = weights.data(), view.radius = int64_t(weights.size() / 2), view.sample = i;
    view.philox = {uint64_t(seed), address ? static_cast<const int64_t*>(address->const_data_ptr()) : nullptr};
    run(view);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(MEDFAST_NAMESPACE, m) {
  m.def("augment(Tensor(a!) out, Tensor boxes, Tensor extent, Tensor numbers, float low, float high, Tensor? address, "
        "int seed) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(MEDFAST_NAMESPACE, CPU, m) { m.impl("augment", TORCH_BOX(&augment)); }
