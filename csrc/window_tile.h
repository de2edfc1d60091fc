// One window of one head while attention is computed on CPU: scratch, and the way of its rows from and to the volume.
// Everything is local to the file that includes it, which is compiled once for each instruction set.
#pragma once

#include "lanes.h"
#include "philox_group.h"
#include "window_job.h"

namespace {

constexpr int64_t kBlock = 32;                      // queries of a window whose scores the backward holds at once
constexpr int64_t kQueries = kBytes == 64 ? 4 : 2;  // vectors of queries whose scores the forward holds at once

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

template <class T>
constexpr int64_t stride_of(int64_t n) {
  return round_up(n, kLanes<T> > 4 ? kLanes<T> : 4);
}

// Scratch of one window of one head. wide: dim, stride: N, both in whole vectors. What lies beyond N and dim is and
// stays zero in what is read in whole vectors: the rows of q, k, v and grad_out, and their lanes. grad_out and delta are
// divided by the sum of the row's exponentials, so that nothing that they are multiplied with has to be.
template <class T>
struct Scratch {
  T *q, *k, *v, *grad_out, *grad_q, *grad_kv;  // (stride, wide)
  T *q_lanes, *k_lanes, *v_lanes;              // (dim, stride): one token per lane
  T *out_lanes, *grad_k_lanes, *grad_v_lanes;  // (dim, stride)
  T *scores, *grad_scores;                     // a block of them
  T *norm_q, *norm_k, *region, *delta;         // (stride): inverse norms, ids, sum_j P_ij dP_ij / sum
  T *none, *unread;                            // a row of zeros, and one that nobody reads
  T* kept;                                     // (N, stride): 0 or 1 / (1 - dropout)
  const T** from;                              // (stride): where rows are read
  T** to;                                      // (stride): where rows are written

  static int64_t lay_out(int64_t n, int64_t dim, T* base, Scratch* scratch) {
    const int64_t wide = round_up(dim, kLanes<T>), stride = stride_of<T>(n);
    const int64_t block = kBlock > kQueries * kLanes<T> ? kBlock : kQueries * kLanes<T>;
    int64_t used = 0;
    const auto take = [&](auto*& field, int64_t count) {
      field = reinterpret_cast<decltype(&*field)>(base + used);
      used += round_up(count * int64_t(sizeof(*field)), 64) / int64_t(sizeof(T));
    };
    T** rows[] = {&scratch->q, &scratch->k, &scratch->v, &scratch->grad_out, &scratch->grad_q, &scratch->grad_kv};
    for (T** field : rows) take(*field, stride * wide);
    T** lanes[] = {&scratch->q_lanes,   &scratch->k_lanes,      &scratch->v_lanes,
                   &scratch->out_lanes, &scratch->grad_k_lanes, &scratch->grad_v_lanes};
    for (T** field : lanes) take(*field, dim * stride);
    take(scratch->scores, stride * block), take(scratch->grad_scores, stride * block);
    take(scratch->norm_q, stride), take(scratch->norm_k, stride);
    take(scratch->region, stride), take(scratch->delta, stride);
    take(scratch->none, wide), take(scratch->unread, wide);
    take(scratch->kept, n * stride);
    take(scratch->from, stride), take(scratch->to, stride);
    return used;
  }
};

template <class T>
INLINE T dot(const T* a, const T* b, int64_t dim) {
  typename Four<T>::V sum{};
  int64_t c = 0;
  for (; c + 4 <= dim; c += 4) sum += Four<T>::load(a + c) * Four<T>::load(b + c);
  T total = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  for (; c < dim; ++c) total += a[c] * b[c];
  return total;
}

template <class T>
INLINE void copy_row(T* to, T factor, const T* from, int64_t dim) {
  int64_t c = 0;
  for (; c + 4 <= dim; c += 4) Four<T>::store(to + c, factor * Four<T>::load(from + c));
  for (; c < dim; ++c) to[c] = factor * from[c];
}

// One window of one head of one sample.
template <class T>
struct Window : Scratch<T> {
  const WindowJob<T>& job;
  const int64_t n, dim, wide, stride, vectors, out_step, qkv_step;  // steps: elements from one token to the next
  int64_t head = 0, sample = 0, window = 0, next_sample = 0;
  T scale = 0;
  const int32_t *source = nullptr, *next_source = nullptr;  // the next window's, null after the last

  Window(const WindowJob<T>& job, T* scratch)
      : job(job), n(job.tokens), dim(job.dim), wide(round_up(dim, kLanes<T>)),
        stride(stride_of<T>(n)), vectors(stride / kLanes<T>), out_step(job.heads * dim), qkv_step(3 * out_step) {
    Scratch<T>::lay_out(n, dim, scratch, this);
    for (int64_t i = n; i < stride; ++i) this->from[i] = this->none, this->to[i] = this->unread;
  }

  bool enter(int64_t index, int64_t end, int64_t of_head) {  // false: the sample is dropped
    head = of_head, scale = job.scale[head];
    sample = index / job.windows, window = index % job.windows;
    source = job.source + window * n;
    next_sample = (index + 1) / job.windows;
    next_source = index + 1 < end ? job.source + (index + 1) % job.windows * n : nullptr;
    if (job.masked[window])
      for (int64_t i = 0; i < n; ++i) this->region[i] = T(job.region[window * n + i]);
    return !job.keep || job.keep[sample];
  }
  bool masked() const { return job.masked[window]; }
  const T* bias() const { return job.bias + head * n * stride; }
  T* highest() const { return job.softmax + ((sample * job.windows + window) * job.heads + head) * 2 * n; }
  T* inverse_sum() const { return highest() + n; }
  // Where this head's rows of a part of qkv, or of out, begin in this sample or another.
  int64_t in_qkv(int64_t part, int64_t of) const {
    return of * job.grid_tokens * qkv_step + (part * job.heads + head) * dim;
  }
  int64_t in_out(int64_t of) const { return of * job.grid_tokens * out_step + head * dim; }

  // Rows of a window lie far apart: while scores are computed, those of this window that will be written and those of
  // the next one that will be read are asked for, one token at a time.
  INLINE void prefetch(int64_t i, bool backward) const {
    const int64_t line = 64 / int64_t(sizeof(T));
    const int64_t here = source[i], next = next_source ? next_source[i] : -1;
    for (int64_t c = 0; c < dim; c += line) {
      if (here >= 0 && !backward) __builtin_prefetch(job.out + in_out(sample) + here * out_step + c, 1, 3);
      for (int64_t part = 0; part < 3; ++part) {
        if (here >= 0 && backward) __builtin_prefetch(job.grad_qkv + in_qkv(part, sample) + here * qkv_step + c, 1, 3);
        if (next >= 0) __builtin_prefetch(job.qkv + in_qkv(part, next_sample) + next * qkv_step + c, 0, 2);
      }
      if (next < 0 || !backward) continue;
      __builtin_prefetch(job.out + in_out(next_sample) + next * out_step + c, 0, 2);
      __builtin_prefetch(job.grad_out + in_out(next_sample) + next * out_step + c, 0, 2);
    }
  }

  // at[i]: where the row of token i is; padding has its own
  template <class P>
  void locate(P* volume, int64_t step, P* padding, P** at) const {
    for (int64_t i = 0; i < n; ++i) at[i] = source[i] < 0 ? padding : volume + source[i] * step;
  }
  // from: where the rows of a part of qkv are. They are copied to `rows` where that is not null, and there made of
  // length one where `norm`, for their inverse norms, is not.
  void read(int64_t part, T* rows, T* norm) const {
    const T** const from = this->from;
    locate(job.qkv + in_qkv(part, sample), qkv_step, job.pad_value + (part * job.heads + head) * dim, from);
    if (rows)
      for (int64_t i = 0; i < n; ++i) copy_row(rows + i * wide, T(1), from[i], dim);
    if (!norm) return;
    for (int64_t i = 0; i < n; ++i) {
      T* x = rows + i * wide;
      const T square = dot(x, x, dim);
      const T length = sizeof(T) == 4 ? T(__builtin_sqrtf(float(square))) : T(__builtin_sqrt(double(square)));
      norm[i] = length > T(1e-12) ? T(1) / length : T(-1e12);  // negative: clamped, a constant to the gradient
      copy_row(x, norm[i] < 0 ? -norm[i] : norm[i], x, dim);
      from[i] = x;
    }
  }
  void to_lanes(T factor, T* lanes) const {  // in blocks of 4 x 4, else it costs more than the scores
    for (int64_t i = 0; i < stride; i += 4) {
      const T *const w = this->from[i], *const x = this->from[i + 1];
      const T *const y = this->from[i + 2], *const z = this->from[i + 3];
      T* to = lanes + i;
      int64_t c = 0;
      for (; c + 4 <= dim; c += 4, to += 4 * stride)
        transpose4(w + c, x + c, y + c, z + c, factor, to, to + stride, to + 2 * stride, to + 3 * stride);
      for (; c < dim; ++c, to += stride)
        to[0] = factor * w[c], to[1] = factor * x[c], to[2] = factor * y[c], to[3] = factor * z[c];
    }
  }
  void from_lanes(T factor, const T* lanes) const {
    for (int64_t i = 0; i < n; i += 4) {
      T *const w = this->to[i], *const x = this->to[i + 1], *const y = this->to[i + 2], *const z = this->to[i + 3];
      const T* from = lanes + i;
      int64_t c = 0;
      for (; c + 4 <= dim; c += 4, from += 4 * stride)
        transpose4(from, from + stride, from + 2 * stride, from + 3 * stride, factor, w + c, x + c, y + c, z + c);
      for (; c < dim; ++c, from += stride)
        w[c] = factor * from[0], x[c] = factor * from[1], y[c] = factor * from[2], z[c] = factor * from[3];
    }
  }
  // kept[a * stride + b]: a is the query and b the key (backward), or the other way round
  void draw(bool queries_first) const {
    const T survivor = T(1.0 / (1.0 - job.dropout));
    const uint32_t least = uint32_t(__builtin_ceilf(float(job.dropout) * 0x1p24f));  // of the top 24 bits
    const int64_t begin = (window * job.heads + head) * n * n, end = begin + n * n;
    const int64_t query_step = queries_first ? stride : 1, key_step = queries_first ? 1 : stride;
    uint32_t word[kRandomGroup];
    int64_t query = 0, key = 0;
    for (int64_t index = begin; index < end;) {
      const int64_t first = index / 4 * 4;
      philox_group(job.philox, sample, uint32_t(first / 4), word);
      for (; index < end && index < first + kRandomGroup; ++index) {
        this->kept[query * query_step + key * key_step] = word[index - first] >> 8 >= least ? survivor : T(0);
        if (++key == n) key = 0, ++query;
      }
    }
  }

  void forward() const;
  void forward_block(int64_t first) const;
  void backward(T* grad_bias, T* grad_pad, T* grad_scale) const;
  void backward_block(int64_t begin, int64_t count, T* grad_bias) const;

  // The gradient of a part, times a factor, goes to the volume, that of pad tokens to grad_pad.
  void write(int64_t part, T factor, T* rows, const T* unit, const T* norm, T* grad_pad) const {
    locate(job.grad_qkv + in_qkv(part, sample), qkv_step, this->unread, this->to);
    for (int64_t i = 0; i < n; ++i) {
      T* g = rows + i * wide;
      if (norm) {  // through x / |x|
        const T along = norm[i] < 0 ? T(0) : dot(g, unit + i * wide, dim);
        for (int64_t c = 0; c < dim; ++c)
          g[c] = (g[c] - along * unit[i * wide + c]) * (norm[i] < 0 ? -norm[i] : norm[i]);
      }
      copy_row(this->to[i], factor, g, dim);
      if (source[i] < 0) add_pad(part, this->to[i], grad_pad);
    }
  }
  void write_lanes(int64_t part, T factor, const T* lanes, const T* unit, const T* norm, T* grad_pad) const {
    T* const rows = this->grad_kv;
    locate(job.grad_qkv + in_qkv(part, sample), qkv_step, this->unread, this->to);
    for (int64_t i = 0; i < n; ++i)
      if (norm || source[i] < 0) this->to[i] = rows + i * wide;
    from_lanes(factor, lanes);
    if (norm) return write(part, T(1), rows, unit, norm, grad_pad);
    for (int64_t i = 0; i < n; ++i)
      if (source[i] < 0) add_pad(part, rows + i * wide, grad_pad);
  }
  void add_pad(int64_t part, const T* row, T* grad_pad) const {
    for (int64_t c = 0; c < dim; ++c) grad_pad[part * dim + c] += row[c];
  }
  void zero(bool backward) const {
    for (int64_t i = 0; i < n; ++i) {
      if (source[i] < 0) continue;
      for (int64_t part = 0; part < (backward ? 3 : 1); ++part) {
        T* to = backward ? job.grad_qkv + in_qkv(part, sample) + source[i] * qkv_step
                         : job.out + in_out(sample) + source[i] * out_step;
        for (int64_t c = 0; c < dim; ++c) to[c] = 0;
      }
    }
  }
};

}  // namespace
