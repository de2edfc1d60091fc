// Class attention, forward and backward, for one instruction set. Keys and values are read once, row after row as they
// lie; what is kept of them is one weight per token and head.
#include "class_attention_kernel.h"

#include "lanes.h"

namespace {

template <class T>
INLINE T dot(const T* a, const T* b, int64_t dim) {
  Vec<T> sum{};
  int64_t c = 0;
  for (; c + kLanes<T> <= dim; c += kLanes<T>) sum += load(a + c) * load(b + c);
  T total = sum_of<T>(sum);
  for (; c < dim; ++c) total += a[c] * b[c];
  return total;
}

// y += factor * x
template <class T>
INLINE void add_scaled(T* y, T factor, const T* x, int64_t dim) {
  int64_t c = 0;
  for (; c + kLanes<T> <= dim; c += kLanes<T>) store<T>(y + c, load(y + c) + factor * load(x + c));
  for (; c < dim; ++c) y[c] += factor * x[c];
}

// y = factor * x
template <class T>
INLINE void scaled(T* y, T factor, const T* x, int64_t dim) {
  int64_t c = 0;
  for (; c + kLanes<T> <= dim; c += kLanes<T>) store<T>(y + c, factor * load(x + c));
  for (; c < dim; ++c) y[c] = factor * x[c];
}

template <class T>
INLINE T* weights_of(const ClassJob<T>& job, int64_t sample, int64_t head) {
  return job.weights + (sample * job.heads + head) * job.tokens;
}

template <class T>
void logits(const ClassJob<T>& job, int64_t sample, int64_t chunk) {
  for (int64_t token = job.first(chunk); token < job.first(chunk + 1); ++token)
    for (int64_t head = 0; head < job.heads; ++head)
      weights_of(job, sample, head)[token] =
          job.scale * dot(job.q.at(sample, 0, head), job.k.at(sample, token, head), job.dim);
}

// exp(x - most) over the row and their sum; what is short of a vector goes through one of its own
template <class T>
T exponentials(T* x, int64_t count, T most) {
  Vec<T> sum{};
  int64_t i = 0;
  for (; i + kLanes<T> <= count; i += kLanes<T>) {
    const Vec<T> e = exp_lanes<T>(load(x + i) - most);
    store<T>(x + i, e);
    sum += e;
  }
  T rest[kLanes<T>] = {};
  for (int64_t j = i; j < count; ++j) rest[j - i] = x[j] - most;
  const Vec<T> e = exp_lanes<T>(load(rest));
  T total = sum_of<T>(sum);
  for (int64_t j = i; j < count; ++j) total += x[j] = e[j - i];
  return total;
}

template <class T>
void softmax(const ClassJob<T>& job, int64_t sample, int64_t head) {
  T* const x = weights_of(job, sample, head);
  T most = x[0];
  for (int64_t i = 1; i < job.tokens; ++i) most = x[i] > most || x[i] != x[i] ? x[i] : most;  // NaN stays
  scaled(x, T(1) / exponentials(x, job.tokens, most), x, job.tokens);
}

template <class T>
void values(const ClassJob<T>& job, int64_t sample, int64_t chunk) {
  const int64_t begin = job.first(chunk), end = job.first(chunk + 1);
  T* const part = job.parts + (sample * job.chunks + chunk) * job.heads * job.dim;
  for (int64_t c = 0; c < job.heads * job.dim; ++c) part[c] = 0;
  for (int64_t token = begin; token < end; ++token) {
    T mean = 0;
    for (int64_t head = 0; head < job.heads; ++head) {
      const T weight = weights_of(job, sample, head)[token];
      mean += weight;
      add_scaled(part + head * job.dim, weight, job.v.at(sample, token, head), job.dim);
    }
    if (token) job.attention[sample * (job.tokens - 1) + token - 1] = mean / T(job.heads);
  }
}

template <class T>
void add_parts(const ClassJob<T>& job, int64_t sample, int64_t head) {
  T* const sum = job.sum + (sample * job.heads + head) * job.dim;
  for (int64_t c = 0; c < job.dim; ++c) sum[c] = 0;
  for (int64_t chunk = 0; chunk < job.chunks; ++chunk)
    add_scaled(sum, T(1), job.parts + ((sample * job.chunks + chunk) * job.heads + head) * job.dim, job.dim);
}

// the sum over tokens of weight times its gradient
template <class T>
void delta(const ClassJob<T>& job, int64_t sample, int64_t head) {
  const int64_t row = (sample * job.heads + head) * job.dim, n = job.tokens - 1;
  T sum = job.grad_out ? dot(job.out + row, job.grad_out + row, job.dim) : T(0);
  if (job.grad_attention)
    sum += dot<T>(weights_of(job, sample, head) + 1, job.grad_attention + sample * n, n) / T(job.heads);
  job.delta[sample * job.heads + head] = sum;
}

template <class T>
void backward(const ClassJob<T>& job, int64_t sample, int64_t chunk) {
  const int64_t begin = job.first(chunk), end = job.first(chunk + 1), dim = job.dim;
  T* const part = job.parts + (sample * job.chunks + chunk) * job.heads * dim;
  for (int64_t c = 0; c < job.heads * dim; ++c) part[c] = 0;
  for (int64_t token = begin; token < end; ++token) {
    const bool seen = job.grad_attention && token;
    const T from_mean = seen ? job.grad_attention[sample * (job.tokens - 1) + token - 1] / T(job.heads) : T(0);
    for (int64_t head = 0; head < job.heads; ++head) {
      const int64_t of_head = sample * job.heads + head, row = (sample * job.tokens + token) * job.heads + head;
      const T weight = weights_of(job, sample, head)[token];
      T grad_weight = from_mean;
      if (job.grad_out) {
        const T* const grad_out = job.grad_out + of_head * dim;
        grad_weight += dot(job.v.at(sample, token, head), grad_out, dim);
        scaled(job.grad_v + row * dim, weight, grad_out, dim);
      }
      const T grad_logit = job.scale * weight * (grad_weight - job.delta[of_head]);
      add_scaled(part + head * dim, grad_logit, job.k.at(sample, token, head), dim);
      scaled(job.grad_k + row * dim, grad_logit, job.q.at(sample, 0, head), dim);
    }
  }
}

}  // namespace

namespace MEDFAST_ISA {
extern constexpr ClassKernel<float> class_float{logits<float>, softmax<float>,  values<float>,
                                                delta<float>,  backward<float>, add_parts<float>};
extern constexpr ClassKernel<double> class_double{logits<double>, softmax<double>,  values<double>,
                                                  delta<double>,  backward<double>, add_parts<double>};
}  // namespace MEDFAST_ISA
