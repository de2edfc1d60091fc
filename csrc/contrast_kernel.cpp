// Token-wise contrast, forward and backward, for one instruction set (compiled once for each). A block of rows meets
// all columns, a few panels at a time: their similarities stay in the nearest caches and never reach memory.
#include "contrast_job.h"

#include "lanes.h"

namespace {

constexpr int64_t kBlock = 96;  // rows that pass over the columns together
constexpr int64_t kGroup = 4;   // panels whose similarities a block holds at once
constexpr int kVectors = 4;     // of a panel
template <class T>
constexpr int64_t kPanel = kVectors * kLanes<T>;
template <class T>
constexpr int64_t kColumns = kGroup * kPanel<T>;

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// c (+)= a b; b in whole vectors
template <class T>
void multiply(const T* a, int64_t lda, int64_t rows, const T* b, int64_t ldb, int64_t vectors, int64_t depth, T* c,
              int64_t ldc, bool add) {
  product(
      a, lda, int64_t(1), rows, b, ldb, vectors, depth,
      [&](int64_t r, int64_t v) INLINE_LAMBDA { return add ? load(c + r * ldc + v * kLanes<T>) : Vec<T>{}; },
      [&](int64_t r, int64_t v, Vec<T> x) INLINE_LAMBDA { store(c + r * ldc + v * kLanes<T>, x); });
}

template <class T>
struct Block {
  using Int = typename ContrastJob<T>::Int;
  typedef Int I __attribute__((vector_size(kBytes)));

  const ContrastJob<T>& job;
  const int64_t begin, end, dim, wide;
  const T* rows;                 // of z
  T *scores, *top, *sum, *grad;  // (kBlock, kColumns), 2 x (kBlock, lanes), (kBlock, wide)

  Block(const ContrastJob<T>& job, int64_t begin, int64_t end, T* scratch)
      : job(job), begin(begin), end(end), dim(job.dim), wide(round_up(dim, kLanes<T>)), rows(job.z + begin * dim) {
    lay_out(dim, scratch, this);
  }

  static int64_t lay_out(int64_t dim, T* base, Block* block) {
    int64_t used = 0;
    const auto take = [&](int64_t count) {
      T* field = base + used;
      used += round_up(count, 64 / int64_t(sizeof(T)));
      return field;
    };
    T* scores = take(kBlock * kColumns<T>);
    T* top = take(kBlock * kLanes<T>), *sum = take(kBlock * kLanes<T>);
    T* grad = take(kBlock * round_up(dim, kLanes<T>));
    if (block) block->scores = scores, block->top = top, block->sum = sum, block->grad = grad;
    return used;
  }

  // finish(row, column, similarities, whether one of them is special) for each row of the block and each panel, after
  // each group of panels group(its first column, its columns)
  template <class Finish, class Group>
  INLINE void sweep(Finish finish, Group group) const {
    for (int64_t first = 0; first < job.tokens; first += kColumns<T>) {
      const int64_t last = first + kColumns<T> < job.tokens ? first + kColumns<T> : job.tokens;
      if (!anchors_in(begin, end) && !anchors_in(first, last)) continue;  // no loss has such a pair
      for (int64_t j = first; j < last; j += kPanel<T>)
        multiply(rows, dim, end - begin, job.panels + j * dim, kPanel<T>, kVectors, dim, scores + (j - first),
                 kColumns<T>, false);
      for (int64_t r = 0; r < end - begin; ++r)
        for (int64_t j = first; j < last; j += kPanel<T>)
          finish(begin + r, j, scores + r * kColumns<T> + (j - first), special(begin + r, j));
      group(first, round_up(last - first, kPanel<T>));
    }
  }
  bool anchors_in(int64_t from, int64_t to) const {
    const int64_t half = job.tokens / 2;
    return (from < job.anchor_end && to > job.anchor_begin) ||
           (from < half + job.anchor_end && to > half + job.anchor_begin);
  }
  // Whether the panel holds the row itself, another token at its position that is weighted, or padding.
  bool special(int64_t row, int64_t column) const {
    if (column + kPanel<T> > job.tokens || (row >= column && row < column + kPanel<T>)) return true;
    if (!job.weighted) return false;
    int64_t ahead = job.position[row] - job.position[column];
    if (ahead < 0) ahead += job.positions;
    return ahead < kPanel<T>;
  }
  // The logits of one row, each s or weighted, and their slope in s.
  INLINE Vec<T> logit(Vec<T> s, int64_t row, int64_t column, Vec<T>* slope) const {
    I index, where, whose;
    for (int l = 0; l < kLanes<T>; ++l) index[l] = Int(column + l);
    __builtin_memcpy(&where, job.position + column, kBytes);
    __builtin_memcpy(&whose, job.volume + column, kBytes);
    const I weighted = (where == job.position[row]) & (whose != job.volume[row]);
    if (slope) *slope = weighted ? Vec<T>{} + job.factor : Vec<T>{} + T(1);
    const Vec<T> none = Vec<T>{} - T(__builtin_inff());
    return (index == Int(row)) | (where < 0) ? none : weighted ? s * job.factor + job.offset : s;
  }

  void forward() const {
    const Vec<T> low = Vec<T>{} - T(1e30);  // finite: the difference of two is a number
    for (int64_t r = 0; r < kBlock; ++r) store(top + r * kLanes<T>, low), store(sum + r * kLanes<T>, Vec<T>{});
    sweep(
        [&](int64_t row, int64_t j, const T* s, bool special) INLINE_LAMBDA {
          T *const top = this->top + (row - begin) * kLanes<T>, *const sum = this->sum + (row - begin) * kLanes<T>;
          Vec<T> x[kVectors], total = load(sum), shift = Vec<T>{} + job.shift;
          for (int v = 0; v < kVectors; ++v) x[v] = load(s + v * kLanes<T>) * job.inverse_temperature;
          if (special)
            for (int v = 0; v < kVectors; ++v) x[v] = logit(x[v], row, j + v * kLanes<T>, nullptr);
          if (job.running) {
            const Vec<T> before = load(top);
            shift = before;
            for (int v = 0; v < kVectors; ++v) shift = larger<T>(x[v], shift);
            total *= exp_lanes<T>(before - shift);
            store(top, shift);
          }
          for (int v = 0; v < kVectors; ++v) total += exp_lanes<T>(x[v] - shift);
          store(sum, total);
        },
        [](int64_t, int64_t) {});
    for (int64_t row = begin; row < end; ++row) finish_row(row);
  }
  void finish_row(int64_t row) const {
    T *const top = this->top + (row - begin) * kLanes<T>, *const sum = this->sum + (row - begin) * kLanes<T>;
    if (!job.running) store(top, Vec<T>{} + job.shift);
    double highest = top[0], total = 0, positive = 0;
    for (int l = 1; l < kLanes<T>; ++l) highest = top[l] > highest ? top[l] : highest;
    for (int l = 0; l < kLanes<T>; ++l) total += sum[l] * __builtin_exp(top[l] - highest);
    const T *one = job.z + row * dim, *other = job.z + partner(row) * dim;
    for (int64_t c = 0; c < dim; ++c) positive += double(one[c]) * double(other[c]);
    const double lse = highest + __builtin_log(total);
    job.lse[row] = T(lse);
    job.loss[row] = T(lse - positive * double(job.inverse_temperature));
  }
  int64_t partner(int64_t row) const { return row < job.tokens / 2 ? row + job.tokens / 2 : row - job.tokens / 2; }

  // The gradient of row i is sum_j slope_ij (P_ij + P_ji) z_j - 2 z_partner, P_ij = exp(logit_ij - lse_i), and P_ji
  // needs no other similarity than P_ij does: one pass, and nobody else writes this row.
  void backward() const {
    for (int64_t c = 0; c < kBlock * wide; ++c) grad[c] = 0;
    sweep(
        [&](int64_t row, int64_t j, T* s, bool special) INLINE_LAMBDA {
          for (int v = 0; v < kVectors; ++v, j += kLanes<T>, s += kLanes<T>) {
            Vec<T> x = load(s) * job.inverse_temperature, slope = Vec<T>{} + T(1);
            if (special) x = logit(x, row, j, &slope);
            const Vec<T> both =
                job.running ? exp_lanes<T>(x - job.lse[row]) + exp_lanes<T>(x - load(job.lse + j))
                            : exp_lanes<T>(x - job.shift) * (job.inverse_sum[row] + load(job.inverse_sum + j));
            store(s, special ? both * slope : both);
          }
        },
        [&](int64_t first, int64_t columns) {
          multiply(scores, kColumns<T>, end - begin, job.rows + first * wide, wide, wide / kLanes<T>, columns, grad,
                   wide, true);
        });
    for (int64_t row = begin; row < end; ++row) {
      const T* other = job.z + partner(row) * dim;
      const T pull = anchors_in(row, row + 1) ? T(2) : T(0);
      for (int64_t c = 0; c < dim; ++c)
        job.grad[row * dim + c] = job.scale * (grad[(row - begin) * wide + c] - pull * other[c]);
    }
  }
};

template <class T>
void pack(const ContrastJob<T>& job, int64_t panel) {
  const int64_t dim = job.dim, wide = round_up(dim, kLanes<T>), first = panel * kPanel<T>;
  const int64_t there = job.tokens - first < kPanel<T> ? job.tokens - first : kPanel<T>;
  const T* z = job.z + first * dim;
  T* lanes = job.panels + first * dim;
  for (int64_t c = 0; c < dim; ++c)
    for (int64_t j = 0; j < kPanel<T>; ++j) lanes[c * kPanel<T> + j] = j < there ? z[j * dim + c] : T(0);
  if (job.rows)
    for (int64_t j = 0; j < kPanel<T>; ++j)
      for (int64_t c = 0; c < wide; ++c)
        job.rows[(first + j) * wide + c] = j < there && c < dim ? z[j * dim + c] : T(0);
  T square[kPanel<T>] = {}, largest = 0, total = 0;
  for (int64_t c = 0; c < dim; ++c)
    for (int64_t j = 0; j < kPanel<T>; ++j) square[j] += lanes[c * kPanel<T> + j] * lanes[c * kPanel<T> + j];
  for (int64_t j = 0; j < kPanel<T>; ++j) total += square[j], largest = square[j] > largest ? square[j] : largest;
  job.square[panel] = largest + (total - total);
}

template <class T>
int64_t scratch_size(int64_t dim) {
  return Block<T>::lay_out(dim, nullptr, nullptr);
}

template <class T>
void forward(const ContrastJob<T>& job, int64_t begin, int64_t end, T* scratch) {
  Block<T>(job, begin, end, scratch).forward();
}

template <class T>
void backward(const ContrastJob<T>& job, int64_t begin, int64_t end, T* scratch) {
  Block<T>(job, begin, end, scratch).backward();
}

}  // namespace

namespace MEDFAST_ISA {
// constexpr: nothing of this file may run when the library is loaded, on a processor that lacks its instructions
template <class T>
constexpr ContrastKernel<T> kKernel{kBlock, kPanel<T>, kLanes<T>, scratch_size<T>, pack<T>, forward<T>, backward<T>};
extern constexpr ContrastKernel<float> contrast_float = kKernel<float>;
extern constexpr ContrastKernel<double> contrast_double = kKernel<double>;
}  // namespace MEDFAST_ISA
