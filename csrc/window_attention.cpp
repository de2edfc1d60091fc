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

#include "window_bias.h"
#include "window_job.h"
#include "window_plan.h"

namespace {

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

// The grid; the public function has checked all this, who calls the operator itself has not.
std::vector<int64_t> checked_grid(const Tensor& qkv, const std::vector<int64_t>& window,
                                  const std::vector<int64_t>& shift) {
  const int64_t axes = window.size();
  STD_TORCH_CHECK((axes == 2 || axes == 3) && qkv.dim() == axes + 4 && qkv.size(1 + axes) == 3,
                  "qkv must be (b, *grid, 3, heads, dim) with a grid of 2 or 3 axes, as many as window has");
  STD_TORCH_CHECK(shift.size() == window.size(), "shift must have as many axes as window");
  STD_TORCH_CHECK(qkv.size(2 + axes) > 0 && qkv.size(3 + axes) > 0, "qkv needs a head and a channel");
  std::vector<int64_t> grid;
  for (int64_t i = 0; i < axes; ++i) {
    STD_TORCH_CHECK(qkv.size(1 + i) > 0 && window[i] > 0 && shift[i] >= 0 && shift[i] < window[i],
                    "on each axis there must be a token, and 0 <= shift < window");
    grid.push_back(qkv.size(1 + i));
  }
  return grid;
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

  Call(const Tensor& qkv_, const OptionalTensor& bias_, const OptionalTensor& rows, const Tensor& scale_,
       const OptionalTensor& pad_value_, const OptionalTensor& keep_, const OptionalTensor& draw_,
       const std::vector<int64_t>& window, const std::vector<int64_t>& shift, bool cosine, bool live_pads,
       double dropout, int64_t seed, bool backward)
      : shared_plan(plan_of(three_axes(checked_grid(qkv_, window, shift), window, shift), live_pads)),
        plan(*shared_plan), qkv(torch::stable::contiguous(qkv_)), scale(torch::stable::contiguous(scale_)) {
    const int64_t axes = window.size();
    batch = qkv.size(0), heads = qkv.size(2 + axes), dim = qkv.size(3 + axes);
    const int64_t lanes = kernel<T>().lanes;
    stride = (plan.tokens + lanes - 1) / lanes * lanes;
    chunks = plan.chunks(batch, heads);
    const auto fits = [&](const OptionalTensor& x, const char* name, size_t count) {
      STD_TORCH_CHECK(!x || size_t(x->numel()) == count, name, " must hold ", count, " numbers");
    };
    fits(scale_, "scale", heads), fits(pad_value_, "pad_value", 3 * heads * dim), fits(keep_, "keep", batch);
    fits(draw_, "draw", 3 * batch);
    bias = bias_rows<T>(Bias(bias_, rows, heads, plan.tokens), heads, plan.tokens, stride, !backward);
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

// The gradient of the bias, of all chunks in their order; that of an entry of a table sums pairs of tokens in theirs.
template <class T>
Tensor bias_gradient(const Call<T>& call, const T* parts, const Tensor& like, const OptionalTensor& rows) {
  const int64_t heads = call.heads, n = call.plan.tokens;
  std::vector<int64_t> size;
  for (int64_t i = 0; i < like.dim(); ++i) size.push_back(like.size(i));
  Tensor grad = call.zeros(call.qkv, size);
  if (!rows) {
    add_chunks(parts, call.chunks, heads * n, call.stride, n, data<T>(grad));
    return grad;
  }
  const Bias bias(like, rows, heads, n);
  std::vector<T> dense(heads * n * n);
  add_chunks(parts, call.chunks, heads * n, call.stride, n, dense.data());
  torch::stable::parallel_for(0, heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t h = begin; h < end; ++h)
      for (int64_t pair = 0; pair < n * n; ++pair) data<T>(grad)[bias.at(h, heads, pair, n)] += dense[h * n * n + pair];
  });
  return grad;
}

template <class T>
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(Call<T> call, const Tensor& grad, const Tensor& out,
                                                    const Tensor& softmax, const OptionalTensor& bias,
                                                    const OptionalTensor& rows) {
  const int64_t heads = call.heads, n = call.plan.tokens, dim = call.dim, slots = call.chunks * heads;
  const Tensor grad_out = torch::stable::contiguous(grad);
  Tensor grad_qkv = torch::stable::new_empty(call.qkv, call.qkv.sizes());
  Tensor grad_pad = call.zeros(call.qkv, {3, heads, dim}), grad_scale = call.zeros(call.qkv, {heads});
  const std::unique_ptr<T[]> bias_parts(bias ? new T[slots * n * call.stride] : nullptr);  // each thread zeroes its own
  std::vector<T> pad_parts(slots * 3 * dim), scale_parts(slots);
  call.job.out = data<T>(out), call.job.softmax = data<T>(softmax), call.job.grad_out = data<T>(grad_out);
  call.job.grad_qkv = data<T>(grad_qkv), call.job.grad_bias = bias_parts.get();
  call.job.grad_pad = pad_parts.data(), call.job.grad_scale = scale_parts.data();
  if (call.chunks) call.run(kernel<T>().backward);
  add_chunks(scale_parts.data(), call.chunks, heads, 1, 1, data<T>(grad_scale));
  for (int64_t slot = 0; slot < slots; ++slot)
    for (int64_t part = 0; part < 3; ++part)
      for (int64_t c = 0; c < dim; ++c)
        data<T>(grad_pad)[(part * heads + slot % heads) * dim + c] += pad_parts[(slot * 3 + part) * dim + c];
  const Tensor grad_bias = bias ? bias_gradient(call, bias_parts.get(), *bias, rows) : call.zeros(call.qkv, {0});
  return {grad_qkv, grad_bias, grad_pad, grad_scale};
}

template <class F>
auto by_type(const Tensor& qkv, F f) {
  STD_TORCH_CHECK(qkv.is_cpu(), "this operator runs on CPU tensors");
  if (qkv.scalar_type() == ScalarType::Float) return f(float());
  STD_TORCH_CHECK(qkv.scalar_type() == ScalarType::Double, "qkv must be float32 or float64");
  return f(double());
}

std::tuple<Tensor, Tensor> window_attention(Tensor qkv, OptionalTensor bias, OptionalTensor rows, Tensor scale,
                                            OptionalTensor pad_value, OptionalTensor keep, OptionalTensor draw,
                                            std::vector<int64_t> window, std::vector<int64_t> shift, bool cosine,
                                            bool live_pads, double dropout, int64_t seed) {
  return by_type(qkv, [&](auto zero) {
    Call<decltype(zero)> call(qkv, bias, rows, scale, pad_value, keep, draw, window, shift, cosine, live_pads, dropout,
                              seed, false);
    std::vector<int64_t> size;
    for (size_t i = 0; i <= window.size(); ++i) size.push_back(qkv.size(i));
    size.push_back(call.heads * call.dim);
    return forward(std::move(call), size);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> window_attention_backward(
    Tensor grad, Tensor out, Tensor softmax, Tensor qkv, OptionalTensor bias, OptionalTensor rows, Tensor scale,
    OptionalTensor pad_value, OptionalTensor keep, OptionalTensor draw, std::vector<int64_t> window,
    std::vector<int64_t> shift, bool cosine, bool live_pads, double dropout, int64_t seed, bool of_bias) {
  return by_type(qkv, [&](auto zero) {
    Call<decltype(zero)> call(qkv, bias, rows, scale, pad_value, keep, draw, window, shift, cosine, live_pads, dropout,
                              seed, true);
    STD_TORCH_CHECK(!of_bias || bias, "without a bias it has no gradient");
    return backward(std::move(call), grad, out, softmax, of_bias ? bias : OptionalTensor(), rows);
  });
}

}  // namespace

#define WINDOW_ARGUMENTS                                                                                  \
  "Tensor qkv, Tensor? bias, Tensor? rows, Tensor scale, Tensor? pad_value, Tensor? keep, Tensor? draw, " \
  "int[] window, int[] shift, bool cosine, bool live_pads, float dropout, int seed"

STABLE_TORCH_LIBRARY_FRAGMENT(MEDFAST_NAMESPACE, m) {
  m.def("window_attention(" WINDOW_ARGUMENTS ") -> (Tensor, Tensor)");
  m.def("window_attention_backward(Tensor grad, Tensor out, Tensor softmax, " WINDOW_ARGUMENTS
        ", bool of_bias) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(MEDFAST_NAMESPACE, CPU, m) {
  m.impl("window_attention", TORCH_BOX(&window_attention));
  m.impl("window_attention_backward", TORCH_BOX(&window_attention_backward));
}
