// One window of one head while attention is computed on CPU: scratch, and the way of its rows from and to the volume.
// Everything is local to the file that includes it, which is compiled once for each instruction set.
#pragma once

#include "lanes.h"
#include "philox.h"
#include "window_job.h"

namespace {

constexpr int64_t kBlock = 32;  // queries of a window whose scores the backward holds at once

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

template <class T>
constexpr int64_t stride_of(int64_t n) {
  return round_up(n, kLanes<T> > 4 ? kLanes<T> : 4);
}

// Scratch of one window of one head. wide: dim, stride: N, both in whole vectors; what lies beyond is and stays zero.
template <class T>
struct Scratch {
  T *q, *k, *v, *grad_out, *grad_q, *grad_k, *grad_v;  // (N, wide)
  T *q_or_k_lanes, *v_lanes;                           // (dim, stride): one token per lane
  T *scores, *grad_scores;                             // a block of them
  T *norm_q, *norm_k, *region, *row_sum;               // (N): inverse norms, ids, sums of a row or its inverse
  T* kept;                                             // (N, stride): 0 or 1 / (1 - dropout)

  static int64_t lay_out(int64_t n, int64_t dim, T* base, Scratch* scratch) {
    const int64_t wide = round_up(dim, kLanes<T>), stride = stride_of<T>(n);
    const int64_t block = kBlock > kVectors * kLanes<T> ? kBlock : kVectors * kLanes<T>;
    int64_t used = 0;
    const auto take = [&](T*& field, int64_t count) {
      field = base + used;
      used += round_up(count, 64 / int64_t(sizeof(T)));
    };
    T** rows[] = {&scratch->q,      &scratch->k,      &scratch->v,     &scratch->grad_out,
                  &scratch->grad_q, &scratch->grad_k, &scratch->grad_v};
    for (T** field : rows) take(*field, stride * wide);
    take(scratch->q_or_k_lanes, dim * stride), take(scratch->v_lanes, dim * stride);
    take(scratch->scores, stride * block), take(scratch->grad_scores, stride * block);
    take(scratch->norm_q, stride), take(scratch->norm_k, stride);
    take(scratch->region, stride), take(scratch->row_sum, stride);
    take(scratch->kept, n * stride);
    return used;
  }
};

template <class T>
INLINE void copy_row(T* to, const T* from, int64_t dim) {
  int64_t c = 0;
  for (; c + 4 <= dim; c += 4) __builtin_memcpy(to + c, from + c, 4 * sizeof(T));
  for (; c < dim; ++c) to[c] = from[c];
}

template <class T>
INLINE T dot(const T* a, const T* b, int64_t dim) {
  T sum = 0;
  for (int64_t c = 0; c < dim; ++c) sum += a[c] * b[c];
  return sum;
}

// One window of one head of one sample.
template <class T>
struct Window : Scratch<T> {
  const WindowJob<T>& job;
  const int64_t n, dim, wide, stride, vectors;
  int64_t head = 0, sample = 0, window = 0;
  T scale = 0;
  const int32_t* source = nullptr;

  Window(const WindowJob<T>& job, T* scratch)
      : job(job), n(job.tokens), dim(job.dim), wide(round_up(dim, kLanes<T>)),
        stride(stride_of<T>(n)), vectors(stride / kLanes<T>) {
    Scratch<T>::lay_out(n, dim, scratch, this);
  }

  bool enter(int64_t index, int64_t of_head) {  // false: the sample is dropped
    head = of_head, scale = job.scale[head];
    sample = index / job.windows, window = index % job.windows;
    source = job.source + window * n;
    if (job.masked[window])
      for (int64_t i = 0; i < n; ++i) this->region[i] = T(job.region[window * n + i]);
    return !job.keep || job.keep[sample];
  }
  bool masked() const { return job.masked[window]; }
  const T* bias() const { return job.bias + head * n * stride; }
  T* lse() const { return job.lse + ((sample * job.windows + window) * job.heads + head) * n; }
  int64_t token(int64_t i, int64_t part) const {  // of qkv and its gradient
    return (((sample * job.grid_tokens + source[i]) * 3 + part) * job.heads + head) * dim;
  }
  int64_t row(int64_t i) const { return ((sample * job.grid_tokens + source[i]) * job.heads + head) * dim; }

  // Rows of a window lie far apart: those of the next one are asked for while this one is computed.
  void prefetch(int64_t index, int64_t end, bool backward) const {
    if (index + 1 >= end) return;
    const int64_t sample = (index + 1) / job.windows, line = 64 / int64_t(sizeof(T));
    const int32_t* source = job.source + (index + 1) % job.windows * n;
    for (int64_t i = 0; i < n; ++i) {
      if (source[i] < 0) continue;
      const int64_t at = sample * job.grid_tokens + source[i];
      for (int64_t c = 0; c < dim; c += line) {
        for (int64_t part = 0; part < 3; ++part)
          __builtin_prefetch(job.qkv + ((at * 3 + part) * job.heads + head) * dim + c, 0, 2);
        if (!backward) continue;
        __builtin_prefetch(job.out + (at * job.heads + head) * dim + c, 0, 2);
        __builtin_prefetch(job.grad_out + (at * job.heads + head) * dim + c, 0, 2);
      }
    }
  }

  void read(int64_t part, T* rows, T* norm) const {
    const T* fill = job.pad_value + (part * job.heads + head) * dim;
    for (int64_t i = 0; i < n; ++i) copy_row(rows + i * wide, source[i] < 0 ? fill : job.qkv + token(i, part), dim);
    if (!norm) return;
    for (int64_t i = 0; i < n; ++i) {
      T* x = rows + i * wide;
      const T square = dot(x, x, dim);
      const T length = sizeof(T) == 4 ? T(__builtin_sqrtf(float(square))) : T(__builtin_sqrt(double(square)));
      norm[i] = length > T(1e-12) ? T(1) / length : T(-1e12);  // negative: clamped, a constant to the gradient
      for (int64_t c = 0; c < dim; ++c) x[c] *= norm[i] < 0 ? -norm[i] : norm[i];
    }
  }
  void to_lanes(const T* rows, T factor, T* lanes) const {  // in blocks of 4 x 4, else it costs more than the scores
    int64_t c = 0;
    for (; c + 4 <= dim; c += 4)
      for (int64_t i = 0; i < n; i += 4) transpose4(rows + i * wide + c, wide, factor, lanes + c * stride + i, stride);
    for (; c < dim; ++c)
      for (int64_t i = 0; i < n; ++i) lanes[c * stride + i] = factor * rows[i * wide + c];
  }
  void read_qkv() const {
    read(0, this->q, job.cosine ? this->norm_q : nullptr);
    read(1, this->k, job.cosine ? this->norm_k : nullptr);
    read(2, this->v, nullptr);
  }
  // kept[a * stride + b]: a is the query and b the key (backward), or the other way round
  void draw(bool queries_first) const {
    const double survivor = 1.0 / (1.0 - job.dropout);
    const int64_t first = (window * job.heads + head) * n * n;
    uint32_t word[4] = {};
    for (int64_t p = 0; p < n * n; ++p) {
      const int64_t index = first + p;
      if (p == 0 || index % 4 == 0) philox_block(job.philox, sample, uint32_t(index / 4), word);
      const bool keeps = float(word[index % 4] >> 8) * 0x1p-24f >= float(job.dropout);
      const int64_t i = p / n, j = p % n;
      this->kept[queries_first ? i * stride + j : j * stride + i] = keeps ? T(survivor) : T(0);
    }
  }

  void forward() const;
  void forward_block(int64_t first) const;
  void backward(T* grad_bias, T* grad_pad, T* grad_scale) const;
  void backward_block(int64_t begin, int64_t count, T* grad_bias) const;

  void write(int64_t part, T* grad, const T* unit, const T* norm, T factor, T* grad_pad) const {
    for (int64_t i = 0; i < n; ++i) {
      T* g = grad + i * wide;
      for (int64_t c = 0; c < wide; ++c) g[c] *= factor;
      if (job.cosine && norm) {  // through x / |x|
        const T along = norm[i] < 0 ? T(0) : dot(unit + i * wide, g, dim);
        for (int64_t c = 0; c < dim; ++c)
          g[c] = (g[c] - along * unit[i * wide + c]) * (norm[i] < 0 ? -norm[i] : norm[i]);
      }
      if (source[i] >= 0)
        copy_row(job.grad_qkv + token(i, part), g, dim);
      else
        for (int64_t c = 0; c < dim; ++c) grad_pad[part * dim + c] += g[c];
    }
  }
  void zero(bool backward) const {
    for (int64_t i = 0; i < n; ++i) {
      if (source[i] < 0) continue;
      for (int64_t part = 0; part < (backward ? 3 : 1); ++part) {
        T* to = backward ? job.grad_qkv + token(i, part) : job.out + row(i);
        for (int64_t c = 0; c < dim; ++c) to[c] = 0;
      }
    }
  }
};

}  // namespace
