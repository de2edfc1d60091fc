// The token-wise contrast on CPU: shifts, volume ids, the choice of instruction set, and threads over blocks of rows.
#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <unordered_map>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "contrast_job.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr double kRange = 80;  // of logits, that exponentials under one shift can bear in fp32

template <class T>
const ContrastKernel<T>& kernel() {
  if constexpr (std::is_same_v<T, float>) return MEDFAST_PICK(contrast_float);
  else return MEDFAST_PICK(contrast_double);
}

template <class T>
T* data(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

template <class T>
struct Aligned {  // elements of T on a cache line, zeroed
  std::vector<T> memory;
  explicit Aligned(int64_t size) : memory(size ? size + 64 / sizeof(T) : 0) {}
  T* get() {
    return memory.empty() ? nullptr : reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
  }
};

struct Options {
  double temperature, factor, offset;
  int64_t first, count;  // volumes that are anchors
};

// What both directions share: contiguous z, ids, packed z, the shift, and the loop over blocks of rows.
template <class T>
struct Call {
  using Int = typename ContrastJob<T>::Int;
  Tensor z;
  int64_t tokens, panels, columns;
  std::vector<Int> position, volume;
  Aligned<T> packed, rows;
  ContrastJob<T> job{};
  bool finite = true;

  Call(const Tensor& z_, const std::optional<Tensor>& ids, const Options& options, bool backward)
      : z(torch::stable::contiguous(z_)), tokens(z.size(0) * z.size(1) * z.size(2)),
        panels((tokens + kernel<T>().panel - 1) / kernel<T>().panel), columns(panels * kernel<T>().panel),
        position(columns, Int(-1)), volume(columns, Int(-1)), packed(columns * z.size(3)),
        rows(backward ? columns * wide() : 0) {
    const int64_t volumes = z.size(1), positions = z.size(2);
    STD_TORCH_CHECK(options.first >= 0 && options.count > 0 && options.count <= volumes - options.first,
                    "anchors must be some of the ", volumes, " volumes");
    STD_TORCH_CHECK(!ids || ids->numel() == volumes, "volume must hold ", volumes, " ids");
    STD_TORCH_CHECK(columns < std::numeric_limits<int32_t>::max(), "z has too many tokens: ", tokens);
    const std::vector<Int> crops = one_id_per_volume(ids, volumes);
    for (int64_t token = 0; token < tokens; ++token) {
      position[token] = Int(token % positions);
      volume[token] = crops[token / positions % volumes];
    }
    job.tokens = tokens, job.dim = z.size(3), job.positions = positions;
    job.anchor_begin = options.first * positions, job.anchor_end = job.anchor_begin + options.count * positions;
    job.z = data<T>(z), job.panels = packed.get(), job.rows = rows.get();
    job.position = position.data(), job.volume = volume.data();
    job.inverse_temperature = T(1 / options.temperature);
    job.factor = T(options.factor), job.offset = T(options.offset);
    job.weighted = options.factor != 1 || options.offset != 0;
    pack(options);
  }
  int64_t wide() const { return (z.size(3) + kernel<T>().lanes - 1) / kernel<T>().lanes * kernel<T>().lanes; }

  static std::vector<Int> one_id_per_volume(const std::optional<Tensor>& ids, int64_t volumes) {
    std::vector<Int> crops(volumes);
    std::unordered_map<int64_t, Int> seen;
    const Tensor given = ids ? torch::stable::contiguous(*ids) : Tensor();
    for (int64_t v = 0; v < volumes; ++v)
      crops[v] = ids ? seen.try_emplace(data<int64_t>(given)[v], Int(v)).first->second : Int(v);
    return crops;
  }
  // The largest |z|^2 bounds every similarity (Cauchy-Schwarz), also of a z that is not normalised.
  void pack(const Options& options) {
    std::vector<T> square(panels);
    job.square = square.data();
    torch::stable::parallel_for(0, panels, 16, [&](int64_t begin, int64_t end) {
      for (int64_t panel = begin; panel < end; ++panel) kernel<T>().pack(job, panel);
    });
    double largest = 0;
    for (const T one : square) finite = finite && std::isfinite(one), largest = std::max(largest, double(one));
    const double bound = largest / options.temperature, above = std::max(options.offset, 0.0);
    const double below = std::isfinite(options.offset) ? std::min(options.offset, 0.0) : 0.0;
    job.shift = T(bound + above);
    job.running = options.factor != 1 || 2 * bound + above - below > kRange;
  }
  void run(void (*compute)(const ContrastJob<T>&, int64_t, int64_t, T*), int64_t from, int64_t to) const {
    const int64_t block = kernel<T>().block;
    torch::stable::parallel_for(0, (to - from + block - 1) / block, 1, [&](int64_t begin, int64_t end) {
      Aligned<T> scratch(kernel<T>().scratch(job.dim));
      for (int64_t b = begin; b < end; ++b)
        compute(job, from + b * block, std::min(from + (b + 1) * block, to), scratch.get());
    });
  }
};

template <class T>
std::tuple<Tensor, Tensor> forward(Call<T> call) {
  ContrastJob<T>& job = call.job;
  Tensor loss = torch::stable::new_empty(call.z, std::vector<int64_t>{});
  Tensor lse = torch::stable::new_empty(call.z, {call.tokens});
  std::vector<T> losses(call.tokens);
  job.lse = data<T>(lse), job.loss = losses.data();
  std::fill(job.lse, job.lse + call.tokens, std::numeric_limits<T>::infinity());
  double sum = call.finite ? 0 : std::numeric_limits<double>::quiet_NaN();
  for (int64_t view = 0; view < 2 && call.finite; ++view) {
    const int64_t begin = view * call.tokens / 2 + job.anchor_begin, end = view * call.tokens / 2 + job.anchor_end;
    call.run(kernel<T>().forward, begin, end);
    for (int64_t token = begin; token < end; ++token) sum += losses[token];
  }
  *data<T>(loss) = T(sum / double(2 * (job.anchor_end - job.anchor_begin)));
  return {loss, lse};
}

template <class T>
Tensor backward(Call<T> call, const Tensor& grad_loss, const Tensor& lse) {
  ContrastJob<T>& job = call.job;
  Tensor grad = torch::stable::new_empty(call.z, call.z.sizes());
  job.grad = data<T>(grad);
  if (!call.finite) {
    std::fill(job.grad, job.grad + call.tokens * job.dim, std::numeric_limits<T>::quiet_NaN());
    return grad;
  }
  const Tensor rows = torch::stable::contiguous(lse);
  std::vector<T> padded(call.columns, std::numeric_limits<T>::infinity()), inverse_sum(job.running ? 0 : call.columns);
  std::copy_n(data<T>(rows), call.tokens, padded.data());
  for (size_t token = 0; token < inverse_sum.size(); ++token) inverse_sum[token] = std::exp(job.shift - padded[token]);
  job.lse = padded.data(), job.inverse_sum = inverse_sum.data();
  job.scale = T(*data<T>(grad_loss) * job.inverse_temperature / T(2 * (job.anchor_end - job.anchor_begin)));
  call.run(kernel<T>().backward, 0, call.tokens);
  return grad;
}

template <class F>
auto by_type(const Tensor& z, F f) {
  STD_TORCH_CHECK(z.is_cpu(), "this operator runs on CPU tensors");
  if (z.scalar_type() == ScalarType::Float) return f(float());
  STD_TORCH_CHECK(z.scalar_type() == ScalarType::Double, "z must be float32 or float64");
  return f(double());
}

std::tuple<Tensor, Tensor> token_contrast(Tensor z, std::optional<Tensor> volume, double temperature, double factor,
                                          double offset, int64_t first, int64_t count) {
  return by_type(z, [&](auto zero) {
    return forward(Call<decltype(zero)>(z, volume, {temperature, factor, offset, first, count}, false));
  });
}

Tensor token_contrast_backward(Tensor grad, Tensor lse, Tensor z, std::optional<Tensor> volume, double temperature,
                               double factor, double offset, int64_t first, int64_t count) {
  return by_type(z, [&](auto zero) {
    return backward(Call<decltype(zero)>(z, volume, {temperature, factor, offset, first, count}, true), grad, lse);
  });
}

}  // namespace

#define CONTRAST_ARGUMENTS \
  "Tensor z, Tensor? volume, float temperature, float factor, float offset, int first, int count"

STABLE_TORCH_LIBRARY_FRAGMENT(MEDFAST_NAMESPACE, m) {
  m.def("token_contrast(" CONTRAST_ARGUMENTS ") -> (Tensor, Tensor)");
  m.def("token_contrast_backward(Tensor grad, Tensor lse, " CONTRAST_ARGUMENTS ") -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(MEDFAST_NAMESPACE, CPU, m) {
  m.impl("token_contrast", TORCH_BOX(&token_contrast));
  m.impl("token_contrast_backward", TORCH_BOX(&token_contrast_backward));
}
