// Vectors of the width this file is compiled for, and two small matrix products on them. Everything here has internal
// linkage and uses nothing of the standard library: the file is compiled once per instruction set, and an inline function
// shared between them could be the wrong one.
#pragma once

#include <cstdint>

namespace {

constexpr int kBytes = MEDFAST_VECTOR_BYTES;
constexpr int kRows = kBytes == 64 ? 4 : 3;  // of a register tile: 16 of 32 or 9 of 16 registers hold sums
constexpr int kVectors = kBytes == 64 ? 4 : 3;

template <class T>
struct Lanes;
template <>
struct Lanes<float> {
  typedef float V __attribute__((vector_size(kBytes)));
  typedef int32_t Int;
  typedef Int I __attribute__((vector_size(kBytes)));
  static constexpr int exponent = 23, degree = 7;
  static constexpr float magic = 12582912.0f, lowest = -86.0f, ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
};
template <>
struct Lanes<double> {
  typedef double V __attribute__((vector_size(kBytes)));
  typedef int64_t Int;
  typedef Int I __attribute__((vector_size(kBytes)));
  static constexpr int exponent = 52, degree = 13;
  static constexpr double magic = 6755399441055744.0, lowest = -706.0, ln2_high = 6.93145751953125e-1,
                          ln2_low = 1.42860682030941723212e-6;
};
template <class T>
using Vec = typename Lanes<T>::V;
template <class T>
constexpr int kLanes = kBytes / int(sizeof(T));

#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))

template <class T>
INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, kBytes);
  return v;
}

template <class T>
INLINE void store(T* p, Vec<T> v) {
  __builtin_memcpy(p, &v, kBytes);
}

#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else  // GCC has that one from 12 on, and this one always
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, I{__VA_ARGS__})
#endif

template <class T>
INLINE void transpose4(const T* from, int64_t ld_from, T factor, T* to, int64_t ld_to) {
  typedef T V __attribute__((vector_size(4 * sizeof(T))));
  [[maybe_unused]] typedef typename Lanes<T>::Int I __attribute__((vector_size(4 * sizeof(T))));
  V row[4];
  for (int r = 0; r < 4; ++r) __builtin_memcpy(&row[r], from + r * ld_from, sizeof(V));
  const V a = SHUFFLE(row[0], row[1], 0, 4, 1, 5), b = SHUFFLE(row[2], row[3], 0, 4, 1, 5);
  const V c = SHUFFLE(row[0], row[1], 2, 6, 3, 7), d = SHUFFLE(row[2], row[3], 2, 6, 3, 7);
  const V column[4] = {SHUFFLE(a, b, 0, 1, 4, 5), SHUFFLE(a, b, 2, 3, 6, 7), SHUFFLE(c, d, 0, 1, 4, 5),
                       SHUFFLE(c, d, 2, 3, 6, 7)};
  for (int r = 0; r < 4; ++r) {
    const V scaled = column[r] * factor;
    __builtin_memcpy(to + r * ld_to, &scaled, sizeof(V));
  }
}

template <class T>
INLINE Vec<T> larger(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}

// exp(x) for x <= 0 or barely above: 2^n times the Taylor series of exp(r), |r| <= ln 2 / 2. Below `lowest` it is zero.
template <class T>
INLINE Vec<T> exp_lanes(Vec<T> x) {
  using L = Lanes<T>;
  using I = typename L::I;
  const Vec<T> shifted = x * T(1.44269504088896340736) + L::magic;  // low bits of its mantissa: n
  const Vec<T> n = shifted - L::magic;
  const Vec<T> r = (x - n * L::ln2_high) - n * L::ln2_low;
  T coefficient[L::degree + 1];
  coefficient[0] = T(1);
  for (int k = 1; k <= L::degree; ++k) coefficient[k] = coefficient[k - 1] / T(k);
  Vec<T> series = r * coefficient[L::degree] + coefficient[L::degree - 1];
#pragma GCC unroll 16
  for (int k = L::degree - 2; k >= 0; --k) series = series * r + coefficient[k];
  const I bits = (I)series + ((I)shifted << L::exponent);
  return x < L::lowest ? Vec<T>{} : (Vec<T>)bits;
}

template <class T, int R, int V, class Init, class Done>
INLINE void product_tile(const T* a, int64_t lda, const T* b, int64_t ldb, int64_t depth, int64_t row, int64_t vec,
                         Init init, Done done) {
  Vec<T> sum[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) sum[r][v] = init(row + r, vec + v);
  a += row * lda;
  b += vec * kLanes<T>;
  for (int64_t c = 0; c < depth; ++c) {
    Vec<T> column[V];
    for (int v = 0; v < V; ++v) column[v] = load(b + c * ldb + v * kLanes<T>);
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) sum[r][v] += a[r * lda + c] * column[v];
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) done(row + r, vec + v, sum[r][v]);
}

// done(r, v, init(r, v) + sum_c a[r, c] * b[c, lanes of v]) for all rows and vectors; short depth, long rows of b.
template <class T, class Init, class Done>
INLINE void product(const T* a, int64_t lda, int64_t rows, const T* b, int64_t ldb, int64_t vectors, int64_t depth,
                    Init init, Done done) {
  int64_t v = 0;
  for (; v + kVectors <= vectors; v += kVectors) {
    int64_t r = 0;
    for (; r + kRows <= rows; r += kRows) product_tile<T, kRows, kVectors>(a, lda, b, ldb, depth, r, v, init, done);
    for (; r < rows; ++r) product_tile<T, 1, kVectors>(a, lda, b, ldb, depth, r, v, init, done);
  }
  for (; v < vectors; ++v) {
    int64_t r = 0;
    for (; r + kRows <= rows; r += kRows) product_tile<T, kRows, 1>(a, lda, b, ldb, depth, r, v, init, done);
    for (; r < rows; ++r) product_tile<T, 1, 1>(a, lda, b, ldb, depth, r, v, init, done);
  }
}

template <class T, int R, int C>
INLINE void mix_tile(const T* m, int64_t across, int64_t along, int64_t count, const T* x, int64_t ld, T* y, bool add) {
  Vec<T> sum[R][C];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) sum[r][c] = add ? load(y + r * ld + c * kLanes<T>) : Vec<T>{};
  for (int64_t s = 0; s < count; ++s) {
    Vec<T> row[C];
    for (int c = 0; c < C; ++c) row[c] = load(x + s * ld + c * kLanes<T>);
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) sum[r][c] += m[r * across + s * along] * row[c];
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) store(y + r * ld + c * kLanes<T>, sum[r][c]);
}

template <class T, int R, int C>
INLINE void mix_rows(const T* m, int64_t across, int64_t along, int64_t count, const T* x, int64_t ld, int64_t rows, T* y,
                     bool add) {
  int64_t r = 0;
  for (; r + R <= rows; r += R) mix_tile<T, R, C>(m + r * across, across, along, count, x, ld, y + r * ld, add);
  for (; r + 4 <= rows; r += 4) mix_tile<T, 4, C>(m + r * across, across, along, count, x, ld, y + r * ld, add);
  for (; r < rows; ++r) mix_tile<T, 1, C>(m + r * across, across, along, count, x, ld, y + r * ld, add);
}

// y[r] (+)= sum_s m[r * across + s * along] * x[s], rows of ld elements: long sums, short rows.
template <class T>
INLINE void mix(const T* m, int64_t across, int64_t along, int64_t count, const T* x, int64_t ld, int64_t rows, T* y,
                bool add) {
  constexpr int wide = kBytes == 64 ? 2 : 1;
  int64_t c = 0;
  for (; c + 2 * kLanes<T> <= ld; c += 2 * kLanes<T>)
    mix_rows<T, 4 * wide, 2>(m, across, along, count, x + c, ld, rows, y + c, add);
  for (; c < ld; c += kLanes<T>) mix_rows<T, 8 * wide, 1>(m, across, along, count, x + c, ld, rows, y + c, add);
}

}  // namespace
