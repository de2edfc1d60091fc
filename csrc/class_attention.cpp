// Class attention on CPU: threads over chunks of the tokens of a sample, whose sums are then added in their order.
#include <algorithm>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "class_attention_kernel.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

template <class T>
const ClassKernel<T>& kernel() {
  if constexpr (std::is_same_v<T, float>) return MEDFAST_PICK(class_float);
  else return MEDFAST_PICK(class_double);
}

template <class T>
T* data(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

Tensor rows(const Tensor& x) {  // any strides, but the elements of a row lie together
  return x.stride(x.dim() - 1) == 1 || x.size(x.dim() - 1) == 1 ? x : torch::stable::contiguous(x);
}

template <class T>
struct Call {
  const Tensor q, k, v;
  ClassJob<T> job{};
  std::vector<T> parts;

  Call(const Tensor& given_q, const Tensor& given_k, const Tensor& given_v, double scale)
      : q(rows(given_q)), k(rows(given_k)), v(rows(given_v)) {
    job.batch = q.size(0), job.heads = q.size(1), job.dim = q.size(2), job.tokens = k.size(1), job.scale = T(scale);
    job.chunks = std::min<int64_t>(64, (job.tokens + 63) / 64);  // of the shape alone
    job.q = {data<const T>(q), q.stride(0), 0, q.stride(1)};
    job.k = {data<const T>(k), k.stride(0), k.stride(1), k.stride(2)};
    job.v = {data<const T>(v), v.stride(0), v.stride(1), v.stride(2)};
    parts.resize(job.batch * job.chunks * job.heads * job.dim);
    job.parts = parts.data();
  }

  // make(job, sample, item) for all items of all samples, each of `cost` elements
  void run(void (*make)(const ClassJob<T>&, int64_t, int64_t), int64_t items, int64_t cost) const {
    const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, cost));
    torch::stable::parallel_for(0, job.batch * items, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) make(job, i / items, i % items);
    });
  }
  void over_chunks(void (*make)(const ClassJob<T>&, int64_t, int64_t)) const {
    run(make, job.chunks, job.tokens * job.heads * job.dim / job.chunks);
  }
  void over_heads(void (*make)(const ClassJob<T>&, int64_t, int64_t)) const { run(make, job.heads, job.tokens); }
};

template <class T>
std::tuple<Tensor, Tensor, Tensor> forward(Call<T> call) {
  ClassJob<T>& job = call.job;
  Tensor out = torch::stable::new_empty(call.q, {job.batch, job.heads * job.dim});
  Tensor attention = torch::stable::new_empty(call.q, {job.batch, job.tokens - 1});
  Tensor weights = torch::stable::new_empty(call.q, {job.batch, job.heads, job.tokens});
  job.sum = data<T>(out), job.attention = data<T>(attention), job.weights = data<T>(weights);
  call.over_chunks(kernel<T>().logits);
  call.over_heads(kernel<T>().softmax);
  call.over_chunks(kernel<T>().values);
  call.over_heads(kernel<T>().add_parts);
  return {out, attention, weights};
}

template <class T>
std::tuple<Tensor, Tensor, Tensor> backward(Call<T> call, const OptionalTensor& grad_out,
                                            const OptionalTensor& grad_attention, const Tensor& out,
                                            const Tensor& weights) {
  ClassJob<T>& job = call.job;
  Tensor grad_q = torch::stable::new_empty(call.q, {job.batch, job.heads, job.dim});
  Tensor grad_k = torch::stable::new_empty(call.q, {job.batch, job.tokens, job.heads, job.dim});
  Tensor grad_v = torch::stable::new_empty(call.q, {job.batch, job.tokens, job.heads, job.dim});
  if (!grad_out) torch::stable::zero_(grad_v);  // out alone reads the values
  std::vector<T> delta(job.batch * job.heads);
  job.sum = data<T>(grad_q), job.grad_k = data<T>(grad_k), job.grad_v = data<T>(grad_v), job.delta = delta.data();
  job.out = data<const T>(out), job.weights = data<T>(weights);
  job.grad_out = grad_out ? data<const T>(*grad_out) : nullptr;
  job.grad_attention = grad_attention ? data<const T>(*grad_attention) : nullptr;
  call.over_heads(kernel<T>().delta);
  call.over_chunks(kernel<T>().backward);
  call.over_heads(kernel<T>().add_parts);
  return {grad_q, grad_k, grad_v};
}

template <class F>
auto by_type(const Tensor& q, const Tensor& k, const Tensor& v, F f) {
  STD_TORCH_CHECK(q.is_cpu() && k.is_cpu() && v.is_cpu(), "this operator runs on CPU tensors");
  STD_TORCH_CHECK(q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type(), "q, k and v: one dtype");
  bool fits = q.dim() == 3 && k.dim() == 4 && v.dim() == 4 && k.size(1) == v.size(1) && k.size(1) >= 2;
  for (int64_t axis = 0; fits && axis < 3; ++axis)
    fits = q.size(axis) == k.size(axis + (axis > 0)) && q.size(axis) == v.size(axis + (axis > 0));
  STD_TORCH_CHECK(fits, "q must be (b, heads, dim) and k, v (b, 1 + n, heads, dim)");
  if (q.scalar_type() == ScalarType::Float) return f(float());
  STD_TORCH_CHECK(q.scalar_type() == ScalarType::Double, "q must be float32 or float64");
  return f(double());
}

std::tuple<Tensor, Tensor, Tensor> class_attention(Tensor q, Tensor k, Tensor v, double scale) {
  return by_type(q, k, v, [&](auto zero) { return forward(Call<decltype(zero)>(q, k, v, scale)); });
}

std::tuple<Tensor, Tensor, Tensor> class_attention_backward(OptionalTensor grad_out, OptionalTensor grad_attention,
                                                            Tensor out, Tensor weights, Tensor q, Tensor k, Tensor v,
                                                            double scale) {
  if (grad_out) grad_out = torch::stable::contiguous(*grad_out);
  if (grad_attention) grad_attention = torch::stable::contiguous(*grad_attention);
  return by_type(q, k, v, [&](auto zero) {
    return backward(Call<decltype(zero)>(q, k, v, scale), grad_out, grad_attention, torch::stable::contiguous(out),
                    torch::stable::contiguous(weights));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(MEDFAST_NAMESPACE, m) {
  m.def("class_attention(Tensor q, Tensor k, Tensor v, float scale) -> (Tensor, Tensor, Tensor)");
  m.def("class_attention_backward(Tensor? grad_out, Tensor? grad_attention, Tensor out, Tensor weights, Tensor q, "
        "Tensor k, Tensor v, float scale) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(MEDFAST_NAMESPACE, CPU, m) {
  m.impl("class_attention", TORCH_BOX(&class_attention));
  m.impl("class_attention_backward", TORCH_BOX(&class_attention_backward));
}
