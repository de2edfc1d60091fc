// Vectors of the width this file is compiled for, and a matrix product on them. Everything here has internal
// linkage and uses nothing of the standard library: the file is compiled once per instruction set, and an inline function
// shared between them could be the wrong one.
#pragma once

#include <cstdint>

namespace {

constexpr int kBytes = MEDFAST_VECTOR_BYTES;

template <class T>
struct Lanes;
template <>
struct Lanes<float> {
  typedef float V __attribute__((vector_size(kBytes)));
  typedef int32_t Int;
  typedef Int I __attribute__((vector_size(kBytes)));
  static constexpr int exponent = 23, degree = 7;
  static constexpr float magic = 12582912.0f, lowest = -86.0f, ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
  static constexpr float lowest2 = -125.0f;
  static constexpr float exp2[] = {1.0f, 6.9314720286e-1f, 2.4022647914e-1f, 5.5503324712e-2f,  // best on [-1/2, 1/2]:
                                   9.6184373574e-3f, 1.3398874404e-3f, 1.5353361945e-4f};       // 2e-8 of 2^r
};
template <>
struct Lanes<double> {
  typedef double V __attribute__((vector_size(kBytes)));
  typedef int64_t Int;
  typedef Int I __attribute__((vector_size(kBytes)));
  static constexpr int exponent = 52, degree = 13;
  static constexpr double magic = 6755399441055744.0, lowest = -706.0, ln2_high = 6.93145751953125e-1,
                          ln2_low = 1.42860682030941723212e-6;
  static constexpr double lowest2 = -1021.0;
  static constexpr double exp2[] = {  // ln(2)^k / k!
      1.0, 6.93147180559945309e-1, 2.40226506959100712e-1, 5.55041086648215800e-2,
      9.61812910762847716e-3, 1.33335581464284434e-3, 1.54035303933816100e-4, 1.52527338040598403e-5,
      1.32154867901443095e-6, 1.01780860092396997e-7, 7.05491162080112333e-9, 4.44553827187081150e-10,
      2.56784359934882051e-11, 1.36914888539041289e-12};
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

template <class T>
INLINE T sum_of(Vec<T> v) {
  T sum = 0;
  for (int lane = 0; lane < kLanes<T>; ++lane) sum += v[lane];
  return sum;
}

#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else  // GCC has that one from 12 on, and this one always
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, I{__VA_ARGS__})
#endif

template <class T>
struct Four {  // elements of a row of any alignment
  typedef T V __attribute__((vector_size(4 * sizeof(T))));
  static INLINE V load(const T* p) {
    V v;
    __builtin_memcpy(&v, p, sizeof(V));
    return v;
  }
  static INLINE void store(T* p, V v) { __builtin_memcpy(p, &v, sizeof(V)); }
};

// Four elements each of rows a, b, c, d, times a factor, into w, x, y, z: their first elements into w, and so on.
template <class T>
INLINE void transpose4(const T* a, const T* b, const T* c, const T* d, T factor, T* w, T* x, T* y, T* z) {
  using V = typename Four<T>::V;
  [[maybe_unused]] typedef typename Lanes<T>::Int I __attribute__((vector_size(4 * sizeof(T))));
  const V row[4] = {Four<T>::load(a), Four<T>::load(b), Four<T>::load(c), Four<T>::load(d)};
  const V ab = SHUFFLE(row[0], row[1], 0, 4, 1, 5), cd = SHUFFLE(row[2], row[3], 0, 4, 1, 5);
  const V ab2 = SHUFFLE(row[0], row[1], 2, 6, 3, 7), cd2 = SHUFFLE(row[2], row[3], 2, 6, 3, 7);
  Four<T>::store(w, SHUFFLE(ab, cd, 0, 1, 4, 5) * factor);
  Four<T>::store(x, SHUFFLE(ab, cd, 2, 3, 6, 7) * factor);
  Four<T>::store(y, SHUFFLE(ab2, cd2, 0, 1, 4, 5) * factor);
  Four<T>::store(z, SHUFFLE(ab2, cd2, 2, 3, 6, 7) * factor);
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
  return x >= L::lowest ? (Vec<T>)bits : larger<T>(Vec<T>{}, x);  // NaN stays
}

// Keeps a vector in its register: the compiler otherwise reads it again from memory for each row that it multiplies.
template <class V>
INLINE void in_register([[maybe_unused]] V& v) {
#ifdef __AVX__
  asm("" : "+x"(v));
#endif
}

// Keeps a table in memory, as if it were another one for each vector: the compiler otherwise spreads its entries over
// registers that a product around it needs.
template <class T, class V>
INLINE const T* in_memory(const T* table, [[maybe_unused]] const V& v) {
#ifdef __AVX__
  asm("" : "+r"(table) : "x"(v));
#endif
  return table;
}

// 2^x for x <= 0 or barely above: 2^n times a polynomial of x - n, |x - n| <= 1/2; zero where that would be denormal.
template <class T>
INLINE Vec<T> exp2_lanes(Vec<T> x) {
  using L = Lanes<T>;
  using I = typename L::I;
  const Vec<T> shifted = x + L::magic;  // low bits of its mantissa: n
  const Vec<T> r = x - (shifted - L::magic);
  constexpr int degree = sizeof(L::exp2) / sizeof(T) - 1;
  const T* const coefficient = in_memory(L::exp2, r);
  Vec<T> series = r * coefficient[degree] + coefficient[degree - 1];
#pragma GCC unroll 16
  for (int k = degree - 2; k >= 0; --k) series = series * r + coefficient[k];
  const I bits = (I)series + ((I)shifted << L::exponent);
  return x >= L::lowest2 ? (Vec<T>)bits : larger<T>(Vec<T>{}, x);  // NaN stays
}

template <class T, int R, int V, class Init, class Done>
INLINE void product_tile(const T* a, int64_t across, int64_t along, const T* b, int64_t ldb, int64_t depth, int64_t row,
                         int64_t vec, Init init, Done done) {
  Vec<T> sum[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[r][v] = init(row + r, vec + v);
  a += row * across;
  b += vec * kLanes<T>;
  for (int64_t s = 0; s < depth; ++s, a += along, b += ldb) {
    Vec<T> column[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) column[v] = load(b + v * kLanes<T>), in_register(column[v]);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[r][v] += a[r * across] * column[v];
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) done(row + r, vec + v, sum[r][v]);
}

template <class T, int R, int V, class Init, class Done>
INLINE void product_strip(const T* a, int64_t across, int64_t along, int64_t rows, const T* b, int64_t ldb,
                          int64_t depth, int64_t vec, Init init, Done done) {
  int64_t r = 0;
  for (; r + R <= rows; r += R) product_tile<T, R, V>(a, across, along, b, ldb, depth, r, vec, init, done);
  if constexpr (R > 4)
    for (; r + 4 <= rows; r += 4) product_tile<T, 4, V>(a, across, along, b, ldb, depth, r, vec, init, done);
  for (; r < rows; ++r) product_tile<T, 1, V>(a, across, along, b, ldb, depth, r, vec, init, done);
}

// done(r, v, init(r, v) + sum_s a[r * across + s * along] * b[s * ldb, lanes of v]) for all rows and vectors.
template <class T, class Init, class Done>
INLINE void product(const T* a, int64_t across, int64_t along, int64_t rows, const T* b, int64_t ldb, int64_t vectors,
                    int64_t depth, Init init, Done done) {
  constexpr int narrow = kBytes == 64 ? 16 : 8;  // rows of a tile of one vector: half of the registers
  int64_t v = 0;
  if constexpr (narrow == 16)
    for (; v + 4 <= vectors; v += 4)
      product_strip<T, narrow / 4, 4>(a, across, along, rows, b, ldb, depth, v, init, done);
  for (; v + 2 <= vectors; v += 2)
    product_strip<T, narrow / 2, 2>(a, across, along, rows, b, ldb, depth, v, init, done);
  if (v < vectors) product_strip<T, narrow, 1>(a, across, along, rows, b, ldb, depth, v, init, done);
}

}  // namespace
