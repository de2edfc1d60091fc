// Window attention, forward and backward, for one instruction set (build_csrc.py compiles this once for each).
// One window and one head at a time: their scores stay in the nearest caches and never reach memory.
#include "window_tile.h"

namespace {

template <class T>
void Window<T>::forward() const {
  read_qkv();
  to_lanes(this->q, scale, this->q_or_k_lanes);
  if (job.dropout > 0) draw(false);
  for (int64_t first = 0; first < vectors; first += kVectors) forward_block(first);
  for (int64_t i = 0; i < n; ++i) {
    if (source[i] < 0) continue;
    T* y = this->grad_q + i * wide;  // borrowed
    for (int64_t c = 0; c < wide; ++c) y[c] *= this->row_sum[i];
    copy_row(job.out + row(i), y, dim);
  }
}

// Scores lie keys x queries, so that maximum and sum of a query stay in their lane.
template <class T>
void Window<T>::forward_block(int64_t first) const {
  const int64_t count = vectors - first < kVectors ? vectors - first : kVectors, lanes = count * kLanes<T>;
  const T* bias = this->bias() + first * kLanes<T>;
  T *scores = this->scores, *region = this->region;
  const int64_t stride = this->stride;
  Vec<T> top[kVectors], sum[kVectors];
  for (int64_t v = 0; v < kVectors; ++v) top[v] = Vec<T>{} - __builtin_inff(), sum[v] = Vec<T>{};
  product(
      this->k, wide, n, this->q_or_k_lanes + first * kLanes<T>, stride, count, dim,
      [&](int64_t j, int64_t v) INLINE_LAMBDA { return load(bias + j * stride + v * kLanes<T>); },
      [&](int64_t j, int64_t v, Vec<T> s) INLINE_LAMBDA { store(scores + j * lanes + v * kLanes<T>, s); });
  for (int64_t v = 0; v < count; ++v) {
    T* column = scores + v * kLanes<T>;
    if (masked()) {
      const Vec<T> own = load(region + (first + v) * kLanes<T>);
      for (int64_t j = 0; j < n; ++j)
        store(column + j * lanes, own == region[j] ? load(column + j * lanes) : Vec<T>{} - __builtin_inff());
    }
    for (int64_t j = 0; j < n; ++j) top[v] = larger<T>(load(column + j * lanes), top[v]);
    for (int64_t j = 0; j < n; ++j) {
      const Vec<T> p = exp_lanes<T>(load(column + j * lanes) - top[v]);
      sum[v] += p;
      store(column + j * lanes, p);
    }
    if (job.dropout > 0)
      for (int64_t j = 0; j < n; ++j)
        store(column + j * lanes, load(column + j * lanes) * load(this->kept + j * stride + (first + v) * kLanes<T>));
  }
  const int64_t begin = first * kLanes<T>, queries = n - begin < lanes ? n - begin : lanes;
  for (int64_t v = 0; v < count; ++v) {
    store(this->row_sum + begin + v * kLanes<T>, T(1) / sum[v]);
    for (int64_t l = 0; l < kLanes<T> && begin + v * kLanes<T> + l < n; ++l)
      lse()[begin + v * kLanes<T> + l] = top[v][l] + T(__builtin_log(double(sum[v][l])));
  }
  mix(scores, int64_t(1), lanes, n, this->v, wide, queries, this->grad_q + begin * wide, false);
}

template <class T>
void Window<T>::backward(T* grad_bias, T* grad_pad, T* grad_scale) const {
  read_qkv();
  to_lanes(this->k, scale, this->q_or_k_lanes);
  to_lanes(this->v, T(1), this->v_lanes);
  for (int64_t i = 0; i < n; ++i) {
    T* grad = this->grad_out + i * wide;
    if (source[i] < 0) {  // nobody reads what a pad token returns
      for (int64_t c = 0; c < dim; ++c) grad[c] = 0;
      this->row_sum[i] = 0;
      continue;
    }
    copy_row(grad, job.grad_out + row(i), dim);
    this->row_sum[i] = dot(grad, job.out + row(i), dim);  // sum_j P_ij dP_ij
  }
  if (job.dropout > 0) draw(true);
  for (int64_t c = 0; c < n * wide; ++c) this->grad_k[c] = this->grad_v[c] = 0;
  for (int64_t i = 0; i < n; i += kBlock) backward_block(i, n - i < kBlock ? n - i : kBlock, grad_bias);
  for (int64_t i = 0; i < n; ++i) *grad_scale += dot(this->q + i * wide, this->grad_q + i * wide, dim);
  write(0, this->grad_q, this->q, this->norm_q, scale, grad_pad);
  write(1, this->grad_k, this->k, this->norm_k, scale, grad_pad);
  write(2, this->grad_v, nullptr, nullptr, T(1), grad_pad);
}

// Scores lie queries x keys: rows of the bias and of its gradient are read and written in place.
template <class T>
void Window<T>::backward_block(int64_t begin, int64_t count, T* grad_bias) const {
  const T *bias = this->bias() + begin * stride, *lse = this->lse() + begin, *delta = this->row_sum + begin;
  const T *region = this->region, *kept = this->kept + begin * stride;
  T *scores = this->scores, *grads = this->grad_scores;
  const int64_t stride = this->stride;
  const bool masked = this->masked(), drops = job.dropout > 0;
  product(
      this->q + begin * wide, wide, count, this->q_or_k_lanes, stride, vectors, dim,
      [&](int64_t i, int64_t v) INLINE_LAMBDA { return load(bias + i * stride + v * kLanes<T>); },
      [&](int64_t i, int64_t v, Vec<T> s) INLINE_LAMBDA {
        if (masked) s = load(region + v * kLanes<T>) == region[begin + i] ? s : Vec<T>{} - __builtin_inff();
        store(scores + i * stride + v * kLanes<T>, exp_lanes<T>(s - lse[i]));
      });
  product(
      this->grad_out + begin * wide, wide, count, this->v_lanes, stride, vectors, dim,
      [&](int64_t, int64_t) INLINE_LAMBDA { return Vec<T>{}; },
      [&](int64_t i, int64_t v, Vec<T> grad) INLINE_LAMBDA {
        const int64_t at = i * stride + v * kLanes<T>;
        const Vec<T> p = load(scores + at);
        if (drops) {
          const Vec<T> survivor = load(kept + at);
          grad *= survivor;
          store(scores + at, p * survivor);
        }
        const Vec<T> ds = p * (grad - delta[i]);
        store(grads + at, ds);
        if (grad_bias) store(grad_bias + begin * stride + at, load(grad_bias + begin * stride + at) + ds);
      });
  mix(scores, int64_t(1), stride, count, this->grad_out + begin * wide, wide, n, this->grad_v, true);
  mix(grads, int64_t(1), stride, count, this->q + begin * wide, wide, n, this->grad_k, true);
  mix(grads, stride, int64_t(1), n, this->k, wide, count, this->grad_q + begin * wide, false);
}

template <class T>
int64_t scratch_size(int64_t tokens, int64_t dim) {
  Scratch<T> unused;
  return Scratch<T>::lay_out(tokens, dim, nullptr, &unused);
}

template <class T>
void forward(const WindowJob<T>& job, const Chunk& chunk, T* scratch) {
  Window<T> window(job, scratch);
  for (int64_t index = chunk.begin; index < chunk.end; ++index)
    for (int64_t head = chunk.head_begin; head < chunk.head_end; ++head) {
      const bool kept = window.enter(index, head);
      window.prefetch(index, chunk.end, false);
      if (kept)
        window.forward();
      else
        window.zero(false);
    }
}

template <class T>
void backward(const WindowJob<T>& job, const Chunk& chunk, T* scratch) {
  Window<T> window(job, scratch);
  for (int64_t index = chunk.begin; index < chunk.end; ++index)
    for (int64_t head = chunk.head_begin; head < chunk.head_end; ++head) {
      const int64_t slot = chunk.index * job.heads + head;
      T* grad_bias = job.grad_bias ? job.grad_bias + slot * window.n * window.stride : nullptr;
      const bool kept = window.enter(index, head);
      window.prefetch(index, chunk.end, true);
      if (kept)
        window.backward(grad_bias, job.grad_pad + slot * 3 * job.dim, job.grad_scale + slot);
      else
        window.zero(true);
    }
}

}  // namespace

namespace MEDFAST_ISA {
// constexpr: nothing of this file may run when the library is loaded, on a processor that lacks its instructions
extern constexpr WindowKernel<float> window_float{stride_of<float>(1), scratch_size<float>, forward<float>,
                                                  backward<float>};
extern constexpr WindowKernel<double> window_double{stride_of<double>(1), scratch_size<double>, forward<double>,
                                                    backward<double>};
}  // namespace MEDFAST_ISA
