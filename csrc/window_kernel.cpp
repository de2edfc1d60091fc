// Window attention, forward and backward, for one instruction set (build_csrc.py compiles this once for each).
// One window and one head at a time: their scores stay in the nearest caches and never reach memory.
#include "window_tile.h"

namespace {

template <class T>
void Window<T>::forward() const {
  read(0, job.cosine ? this->q : nullptr, job.cosine ? this->norm_q : nullptr);
  to_lanes(T(1), this->q_lanes);
  read(1, this->k, job.cosine ? this->norm_k : nullptr);
  for (int64_t j = 0; j < n; ++j)  // k is what is scaled in the backward too: the same scores to the last bit
    copy_row(this->k + j * wide, scale * T(kLog2E), this->k + j * wide, dim);
  read(2, this->v, nullptr);
  if (job.dropout > 0) draw(false);
  for (int64_t first = 0; first < vectors; first += kQueries) forward_block(first);
  locate(job.out + in_out(sample), out_step, this->unread, this->to);
  from_lanes(T(1), this->out_lanes);
}

// Scores lie keys x queries, so that maximum and sum of a query stay in their lane.
template <class T>
void Window<T>::forward_block(int64_t first) const {
  const int64_t count = vectors - first < kQueries ? vectors - first : kQueries, lanes = count * kLanes<T>;
  const int64_t stride = this->stride, begin = first * kLanes<T>, queries = n - begin < lanes ? n - begin : lanes;
  const T *bias = this->bias() + begin, *region = this->region, *kept = this->kept + begin;
  T *scores = this->scores, *out = this->out_lanes + begin;
  const bool masked = this->masked();
  Vec<T> top[kQueries], sum[kQueries];
  for (int64_t v = 0; v < kQueries; ++v) top[v] = Vec<T>{} - __builtin_inff(), sum[v] = Vec<T>{};
  product(
      this->k, wide, int64_t(1), n, this->q_lanes + begin, stride, count, dim,
      [&](int64_t j, int64_t v) INLINE_LAMBDA {
        if (v == 0 && first == 0) prefetch(j, false);
        return load(bias + j * stride + v * kLanes<T>);
      },
      [&](int64_t j, int64_t v, Vec<T> s) INLINE_LAMBDA {
        if (masked) s = load(region + begin + v * kLanes<T>) == region[j] ? s : Vec<T>{} - __builtin_inff();
        top[v] = larger<T>(s, top[v]);
        store(scores + j * lanes + v * kLanes<T>, s);
      });
  for (int64_t v = 0; v < count; ++v) {
    T* column = scores + v * kLanes<T>;
    for (int64_t j = 0; j < n; ++j) {
      const Vec<T> p = exp2_lanes<T>(load(column + j * lanes) - top[v]);
      sum[v] += p;
      store(column + j * lanes, job.dropout > 0 ? p * load(kept + j * stride + v * kLanes<T>) : p);
    }
    sum[v] = T(1) / sum[v];
    const int64_t left = queries - v * kLanes<T>, there = left < 0 ? 0 : left < kLanes<T> ? left : kLanes<T>;
    __builtin_memcpy(highest() + begin + v * kLanes<T>, &top[v], there * sizeof(T));
    __builtin_memcpy(inverse_sum() + begin + v * kLanes<T>, &sum[v], there * sizeof(T));
  }
  product(
      this->v, int64_t(1), wide, dim, scores, lanes, count, n,
      [](int64_t, int64_t) INLINE_LAMBDA { return Vec<T>{}; },
      [&](int64_t c, int64_t v, Vec<T> x) INLINE_LAMBDA { store(out + c * stride + v * kLanes<T>, x * sum[v]); });
}

template <class T>
void Window<T>::backward(T* grad_bias, T* grad_pad, T* grad_scale) const {
  T* const norm_q = job.cosine ? this->norm_q : nullptr;
  T* const norm_k = job.cosine ? this->norm_k : nullptr;
  read(1, this->k, norm_k);
  to_lanes(scale * T(kLog2E), this->k_lanes);
  read(2, nullptr, nullptr);
  to_lanes(T(1), this->v_lanes);
  read(0, this->q, norm_q);
  for (int64_t i = 0; i < n; ++i) {
    const int64_t at = in_out(sample) + source[i] * out_step;
    const T *grad = source[i] < 0 ? this->none : job.grad_out + at, *out = source[i] < 0 ? this->none : job.out + at;
    copy_row(this->grad_out + i * wide, inverse_sum()[i], grad, dim);
    this->delta[i] = dot(this->grad_out + i * wide, out, dim);
  }
  if (job.dropout > 0) draw(true);
  for (int64_t i = 0; i < n; i += kBlock) backward_block(i, n - i < kBlock ? n - i : kBlock, grad_bias);
  Vec<T> along{};
  for (int64_t c = 0; c < n * wide; c += kLanes<T>) along += load(this->q + c) * load(this->grad_q + c);
  *grad_scale += sum_of<T>(along);
  write(0, scale, this->grad_q, this->q, norm_q, grad_pad);
  write_lanes(1, scale, this->grad_k_lanes, this->k, norm_k, grad_pad);
  write_lanes(2, T(1), this->grad_v_lanes, nullptr, nullptr, grad_pad);
}

// Scores lie queries x keys: rows of the bias and of its gradient are read and written in place.
template <class T>
void Window<T>::backward_block(int64_t begin, int64_t count, T* grad_bias) const {
  const T *bias = this->bias() + begin * stride, *highest = this->highest() + begin, *delta = this->delta + begin;
  const T *region = this->region, *kept = this->kept + begin * stride;
  T *scores = this->scores, *grads = this->grad_scores;
  const int64_t stride = this->stride;
  const bool masked = this->masked(), drops = job.dropout > 0;
  if (grad_bias) grad_bias += begin * stride;
  product(
      this->q + begin * wide, wide, int64_t(1), count, this->k_lanes, stride, vectors, dim,
      [&](int64_t i, int64_t v) INLINE_LAMBDA {
        if (v == 0) prefetch(begin + i, true);
        return load(bias + i * stride + v * kLanes<T>);
      },
      [&](int64_t i, int64_t v, Vec<T> s) INLINE_LAMBDA {
        if (masked) s = load(region + v * kLanes<T>) == region[begin + i] ? s : Vec<T>{} - __builtin_inff();
        store(scores + i * stride + v * kLanes<T>, exp2_lanes<T>(s - highest[i]));
      });
  product(
      this->grad_out + begin * wide, wide, int64_t(1), count, this->v_lanes, stride, vectors, dim,
      [](int64_t, int64_t) INLINE_LAMBDA { return Vec<T>{}; },
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
        if (grad_bias) store(grad_bias + at, load(grad_bias + at) + ds);
      });
  const auto add = [&](const T* rows, const T* weights, T* lanes) INLINE_LAMBDA {  // rows (transposed) times weights
    product(
        rows + begin * wide, int64_t(1), wide, dim, weights, stride, vectors, count,
        [&](int64_t c, int64_t v) INLINE_LAMBDA { return begin ? load(lanes + c * stride + v * kLanes<T>) : Vec<T>{}; },
        [&](int64_t c, int64_t v, Vec<T> x) INLINE_LAMBDA { store(lanes + c * stride + v * kLanes<T>, x); });
  };
  add(this->grad_out, scores, this->grad_v_lanes);
  add(this->q, grads, this->grad_k_lanes);
  T* grad_q = this->grad_q + begin * wide;
  product(
      grads, stride, int64_t(1), count, this->k, wide, wide / kLanes<T>, n,
      [](int64_t, int64_t) INLINE_LAMBDA { return Vec<T>{}; },
      [&](int64_t i, int64_t v, Vec<T> x) INLINE_LAMBDA { store(grad_q + i * wide + v * kLanes<T>, x); });
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
      if (window.enter(index, chunk.end, head))
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
      if (grad_bias && index == chunk.begin) __builtin_memset(grad_bias, 0, window.n * window.stride * sizeof(T));
      if (window.enter(index, chunk.end, head))
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
