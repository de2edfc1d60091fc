// Window attention on CPU: the plan of windows, the choice of instruction set, and threads over chunks of windows.
#include <algorithm>
#include <cmath>
#include <limits>
#include <list>
#include <memory>
#include <mutex>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "window_job.h"
#include "window_plan.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The plans of the last geometries: a model has two for each of its stages, and asks for them in every pass.
std::shared_ptr<const Plan> plan_of(const Axes& axes, bool live_pads) {
  struct Entry {
    Axes axes;
    bool live_pads;
    std::shared_ptr<const Plan> plan;
  };
  constexpr size_t kPlans = 32;
  static std::mutex guard;
  static std::list<Entry> recent;  // the last one used comes first
  const std::lock_guard<std::mutex> lock(guard);
  const auto same = [&](const Entry& entry) { return entry.axes == axes && entry.live_pads == live_pads; };
  const auto found = std::find_if(recent.begin(), recent.end(), same);
  if (found != recent.end()) {
    recent.splice(recent.begin(), recent, found);
  } else {
    recent.push_front({axes, live_pads, std::make_shared<const Plan>(make_plan(axes, live_pads))});
    if (recent.size() > kPlans) recent.pop_back();
  }
  return recent.front().plan;
}

template <class T>
const WindowKernel<T>& kernel() {
  if constexpr (std::is_same_v<T, float>) return MEDFAST_PICK(window_float);
  else return MEDFAST_PICK(window_double);
}

std::vector<int64_t> grid_of(const Tensor& qkv, size_t axes) {
  std::vector<int64_t> grid;
  for (size_t i = 0; i < axes; ++i) grid.push_back(qkv.size(1 + i));
  return grid;
}

template <class T>
T* data(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

// A score as a power of two. One that is finite stays so: masks are made of the lowest number there is.
template <class T>
T power_of_two(T score) {
  const T power = T(kLog2E) * score, most = std::numeric_limits<T>::max();
  return std::isfinite(score) ? std::clamp(power, -most, most) : score;
}

// The bias in powers of two. For the backward rows are padded to whole vectors with -inf, so that no key beyond the
// window is ever attended.
template <class T>
std::vector<T> bias_rows(const OptionalTensor& bias, int64_t heads, int64_t n, int64_t stride, bool transposed) {
  std::vector<T> rows(heads * n * stride, T(0));
  const Tensor dense = bias ? torch::stable::contiguous(*bias) : Tensor();
  for (int64_t h = 0; h < heads; ++h)
    for (int64_t i = 0; i < n; ++i) {
      T* row = rows.data() + (h * n + i) * stride;
      if (bias) {
        const T* from = data<T>(dense) + h * n * n;
        for (int64_t j = 0; j < n; ++j) row[j] = power_of_two(transposed ? from[j * n + i] : from[i * n + j]);
      }
      if (!transposed) std::fill(row + n, row + stride, -std::numeric_limits<T>::infinity());
    }
  return rows;
}

// What both directions share: contiguous inputs, the plan, the bias, and the loop over chunks.
template <class T>
struct Call {
  std::shared_ptr<const Plan> shared_plan;
  const Plan& plan;
  int64_t batch, heads, dim, stride, chunks;
  Tensor qkv, scale, pad_value, keep, draw;
  std::vector<T> bias;
  WindowJob<T> job{};

  Call(const Tensor& qkv_, const OptionalTensor& bias_, const Tensor& scale_, const OptionalTensor& pad_value_,
       const OptionalTensor& keep_, const OptionalTensor& draw_, const std::vector<int64_t>& window,
       const std::vector<int64_t>& shift, bool cosine, bool live_pads, double dropout, int64_t seed, bool backward)
      : shared_plan(plan_of(three_axes(grid_of(qkv_, window.size()), window, shift), live_pads)), plan(*shared_plan),
        qkv(torch::stable::contiguous(qkv_)), scale(torch::stable::contiguous(scale_)) {
    const int64_t axes = window.size();
    batch = qkv.size(0), heads = qkv.size(2 + axes), dim = qkv.size(3 + axes);
    const int64_t lanes = kernel<T>().lanes;
    stride = (plan.tokens + lanes - 1) / lanes * lanes;
    chunks = plan.chunks(batch, heads);
    bias = bias_rows<T>(bias_, heads, plan.tokens, stride, !backward);
    pad_value = pad_value_ ? torch::stable::contiguous(*pad_value_) : zeros(qkv, {3, heads, dim});
    if (keep_) keep = torch::stable::contiguous(*keep_);
    if (draw_) draw = torch::stable::contiguous(*draw_);
    job.batch = batch, job.heads = heads, job.dim = dim;
    job.windows = plan.windows, job.tokens = plan.tokens, job.grid_tokens = plan.grid_tokens;
    job.source = plan.source.data(), job.region = plan.region.data(), job.masked = plan.masked.data();
    job.qkv = data<T>(qkv), job.bias = bias.data(), job.scale = data<T>(scale), job.pad_value = data<T>(pad_value);
    job.keep = keep_ ? data<bool>(keep) : nullptr;
    job.cosine = cosine, job.dropout = draw_ ? dropout : 0.0;
    job.philox = {uint64_t(seed), draw_ ? data<int64_t>(draw) : nullptr};
  }
  static Tensor zeros(const Tensor& like, std::vector<int64_t> size) {
    Tensor x = torch::stable::new_empty(like, size);
    return torch::stable::zero_(x);
  }
  void run(void (*kernel_function)(const WindowJob<T>&, const Chunk&, T*)) const {
    const int64_t all = batch * plan.windows, size = kernel<T>().scratch(plan.tokens, dim);
    torch::stable::parallel_for(0, chunks * heads, 1, [&](int64_t begin, int64_t end) {
      std::vector<T> memory(size + 64 / sizeof(T), T(0));
      T* scratch = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
      for (int64_t item = begin; item < end;) {  // the heads of a chunk together: they share cache lines
        const int64_t chunk = item / heads, next = std::min(end, (chunk + 1) * heads);
        const int64_t head = item - chunk * heads;
        const Chunk part{chunk, chunk * all / chunks, (chunk + 1) * all / chunks, head, head + next - item};
        kernel_function(job, part, scratch);
        item = next;
      }
    });
  }
};

template <class T>
std::tuple<Tensor, Tensor> forward(Call<T> call, std::vector<int64_t> out_size) {
  Tensor out = torch::stable::new_empty(call.qkv, out_size);
  Tensor softmax = torch::stable::new_empty(call.qkv, {call.batch, call.plan.windows, call.heads, 2, call.plan.tokens});
  call.job.out = data<T>(out), call.job.softmax = data<T>(softmax);
  if (call.job.keep) torch::stable::zero_(softmax);  // dropped samples leave theirs unwritten
  if (call.chunks) call.run(kernel<T>().forward);
  return {out, softmax};
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

template <class T>
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(Call<T> call, const Tensor& grad, const Tensor& out,
                                                    const Tensor& softmax, bool bias) {
  const int64_t heads = call.heads, n = call.plan.tokens, dim = call.dim, slots = call.chunks * heads;
  const Tensor grad_out = torch::stable::contiguous(grad);
  Tensor grad_qkv = torch::stable::new_empty(call.qkv, call.qkv.sizes());
  Tensor grad_bias = call.zeros(call.qkv, bias ? std::vector<int64_t>{heads, n, n} : std::vector<int64_t>{0});
  Tensor grad_pad = call.zeros(call.qkv, {3, heads, dim}), grad_scale = call.zeros(call.qkv, {heads});
  const std::unique_ptr<T[]> bias_parts(bias ? new T[slots * n * call.stride] : nullptr);  // each thread zeroes its own
  std::vector<T> pad_parts(slots * 3 * dim), scale_parts(slots);
  call.job.out = data<T>(out), call.job.softmax = data<T>(softmax), call.job.grad_out = data<T>(grad_out);
  call.job.grad_qkv = data<T>(grad_qkv), call.job.grad_bias = bias_parts.get();
  call.job.grad_pad = pad_parts.data(), call.job.grad_scale = scale_parts.data();
  if (call.chunks) call.run(kernel<T>().backward);
  if (bias) add_chunks(bias_parts.get(), call.chunks, heads * n, call.stride, n, data<T>(grad_bias));
  add_chunks(scale_parts.data(), call.chunks, heads, 1, 1, data<T>(grad_scale));
  for (int64_t slot = 0; slot < slots; ++slot)
    for (int64_t part = 0; part < 3; ++part)
      for (int64_t c = 0; c < dim; ++c)
        data<T>(grad_pad)[(part * heads + slot % heads) * dim + c] += pad_parts[(slot * 3 + part) * dim + c];
  return {grad_qkv, grad_bias, grad_pad, grad_scale};
}

template <class F>
auto by_type(const Tensor& qkv, F f) {
  STD_TORCH_CHECK(qkv.is_cpu(), "this operator runs on CPU tensors");
  if (qkv.scalar_type() == ScalarType::Float) return f(float());
  STD_TORCH_CHECK(qkv.scalar_type() == ScalarType::Double, "qkv must be float32 or float64");
  return f(double());
}

std::tuple<Tensor, Tensor> window_attention(Tensor qkv, OptionalTensor bias, Tensor scale, OptionalTensor pad_value,
                                            OptionalTensor keep, OptionalTensor draw, std::vector<int64_t> window,
                                            std::vector<int64_t> shift, bool cosine, bool live_pads, double dropout,
                                            int64_t seed) {
  return by_type(qkv, [&](auto zero) {
    std::vector<int64_t> size;
    for (size_t i = 0; i <= window.size(); ++i) size.push_back(qkv.size(i));
    size.push_back(qkv.size(window.size() + 2) * qkv.size(window.size() + 3));
    return forward(Call<decltype(zero)>(qkv, bias, scale, pad_value, keep, draw, window, shift, cosine, live_pads, dropout,
                                        seed, false),
                   size);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> window_attention_backward(
    Tensor grad, Tensor out, Tensor softmax, Tensor qkv, OptionalTensor bias, Tensor scale, OptionalTensor pad_value,
    OptionalTensor keep, OptionalTensor draw, std::vector<int64_t> window, std::vector<int64_t> shift, bool cosine,
    bool live_pads, double dropout, int64_t seed, bool of_bias) {
  return by_type(qkv, [&](auto zero) {
    return backward(Call<decltype(zero)>(qkv, bias, scale, pad_value, keep, draw, window, shift, cosine, live_pads, dropout,
                                         seed, true),
                    grad, out, softmax, of_bias);
  });
}

}  // namespace

#define WINDOW_ARGUMENTS                                                                                  \
  "Tensor qkv, Tensor? bias, Tensor scale, Tensor? pad_value, Tensor? keep, Tensor? draw, int[] window, " \
  "int[] shift, bool cosine, bool live_pads, float dropout, int seed"

STABLE_TORCH_LIBRARY_FRAGMENT(MEDFAST_NAMESPACE, m) {
  m.def("window_attention(" WINDOW_ARGUMENTS ") -> (Tensor, Tensor)");
  m.def("window_attention_backward(Tensor grad, Tensor out, Tensor softmax, " WINDOW_ARGUMENTS
        ", bool of_bias) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(MEDFAST_NAMESPACE, CPU, m) {
  m.impl("window_attention", TORCH_BOX(&window_attention));
  m.impl("window_attention_backward", TORCH_BOX(&window_attention_backward));
}
