// Dropping and restoring tokens on CPU. Both directions of both operators read through a map and write every row of
// their result once: nothing is zeroed first, nothing is added to twice, and sums have one order.
#include <algorithm>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

template <class T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;  // what sums are made in

constexpr int64_t kGrain = 32768;  // elements a thread takes at least

template <class T>
const T* read(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}
template <class T>
T* write(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}
template <class T>
constexpr ScalarType type_of = std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float;

// f(row) for all rows of d elements, on any thread
template <class F>
void for_rows(int64_t rows, int64_t d, F f) {
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, d)),
                              [&](int64_t begin, int64_t end) {
                                for (int64_t row = begin; row < end; ++row) f(row);
                              });
}

// ids of a batch: distinct numbers in [0, n) in every row
struct Ids {
  const Tensor dense;
  const int64_t batch, count, n;
  const int64_t* const at;

  Ids(const Tensor& ids, int64_t batch, int64_t n)
      : dense(torch::stable::contiguous(ids)), batch(batch), count(dense.dim() == 2 ? dense.size(1) : -1), n(n),
        at(read<int64_t>(dense)) {
    STD_TORCH_CHECK(dense.is_cpu() && dense.scalar_type() == ScalarType::Long && count >= 0 && dense.size(0) == batch,
                    "ids must be (b, count) int64 on a CPU");
    for (int64_t i = 0; i < batch * count; ++i)
      STD_TORCH_CHECK(at[i] >= 0 && at[i] < n, "ids must be in [0, ", n, "), got ", at[i]);
  }

  // (b, n): where in ids each token is, -1 if it is not there
  std::vector<int32_t> inverse() const {
    std::vector<int32_t> map(batch * n, -1);
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t j = 0; j < count; ++j) {
        int32_t& place = map[b * n + at[b * count + j]];
        STD_TORCH_CHECK(place < 0, "ids must be distinct in every row, got ", at[b * count + j], " twice");
        place = int32_t(j);
      }
    return map;
  }
};

template <class T>
Tensor drop(const Tensor& x, const Ids& ids, const OptionalTensor& position) {
  const int64_t d = x.size(2), batch_stride = x.stride(0), row_stride = x.stride(1);
  Tensor out = torch::stable::new_empty(x, {ids.batch, ids.count, d});
  const T* const from = read<T>(x);
  const Wide<T>* const at = position ? read<Wide<T>>(*position) : nullptr;
  for_rows(ids.batch * ids.count, d, [&, to = write<T>(out)](int64_t row) {
    const int64_t token = ids.at[row];
    const T* source = from + row / ids.count * batch_stride + token * row_stride;
    if (!at) return void(std::copy_n(source, d, to + row * d));
    for (int64_t c = 0; c < d; ++c) to[row * d + c] = T(Wide<T>(source[c]) + at[token * d + c]);
  });
  return out;
}

// Of x, a row of the gradient or zero for every token; of position, the sum over samples, in their order.
template <class T>
std::tuple<Tensor, Tensor> drop_backward(const Tensor& grad, const Ids& ids, bool position) {
  const int64_t n = ids.n, d = grad.size(2);
  const std::vector<int32_t> map = ids.inverse();
  Tensor grad_x = torch::stable::new_empty(grad, {ids.batch, n, d});
  Tensor grad_position = torch::stable::new_empty(grad, {position ? n : 0, d}, type_of<Wide<T>>);
  for_rows(n, ids.batch * d, [&, from = read<T>(grad), to = write<T>(grad_x),
                              sums = write<Wide<T>>(grad_position)](int64_t token) {
    Wide<T>* const sum = sums + token * d;
    if (position) std::fill_n(sum, d, Wide<T>(0));
    for (int64_t b = 0; b < ids.batch; ++b) {
      const int64_t at = map[b * n + token];
      T* const row = to + (b * n + token) * d;
      if (at < 0) {
        std::fill_n(row, d, T(0));
        continue;
      }
      const T* const source = from + (b * ids.count + at) * d;
      std::copy_n(source, d, row);
      for (int64_t c = 0; position && c < d; ++c) sum[c] += Wide<T>(source[c]);
    }
  });
  return {grad_x, grad_position};
}

template <class T>
Tensor restore(const Tensor& y, const Ids& ids, const Tensor& fill) {
  const int64_t n = ids.n, d = y.size(2), batch_stride = y.stride(0), row_stride = y.stride(1);
  const std::vector<int32_t> map = ids.inverse();
  std::vector<T> rounded(d);
  for (int64_t c = 0; c < d; ++c) rounded[c] = T(read<Wide<T>>(fill)[c]);
  Tensor out = torch::stable::new_empty(y, {ids.batch, n, d});
  for_rows(ids.batch * n, d, [&, from = read<T>(y), to = write<T>(out)](int64_t row) {
    const T* source = map[row] < 0 ? rounded.data() : from + row / n * batch_stride + map[row] * row_stride;
    std::copy_n(source, d, to + row * d);
  });
  return out;
}

// Of y, its rows of the gradient; of fill, the sum over all others: over parts of the batch's places, then their sums.
template <class T>
std::tuple<Tensor, Tensor> restore_backward(const Tensor& grad, const Ids& ids) {
  const int64_t n = ids.n, d = grad.size(2), places = ids.batch * n;
  const int64_t parts = std::min<int64_t>(64, (places + 63) / 64);  // of the shape alone
  const std::vector<int32_t> map = ids.inverse();
  Tensor grad_y = torch::stable::new_empty(grad, {ids.batch, ids.count, d});
  Tensor grad_fill = torch::stable::new_empty(grad, {d}, type_of<Wide<T>>);
  std::vector<Wide<T>> sums(parts * d, Wide<T>(0));
  for_rows(parts, parts ? places * d / parts : 1, [&, from = read<T>(grad), to = write<T>(grad_y)](int64_t part) {
    Wide<T>* const sum = sums.data() + part * d;
    for (int64_t place = part * places / parts; place < (part + 1) * places / parts; ++place) {
      const T* source = from + place * d;
      if (map[place] < 0)
        for (int64_t c = 0; c < d; ++c) sum[c] += Wide<T>(source[c]);
      else
        std::copy_n(source, d, to + (place / n * ids.count + map[place]) * d);
    }
  });
  Wide<T>* const total = write<Wide<T>>(grad_fill);
  std::fill_n(total, d, Wide<T>(0));
  for (int64_t part = 0; part < parts; ++part)
    for (int64_t c = 0; c < d; ++c) total[c] += sums[part * d + c];
  return {grad_y, grad_fill};
}

template <class F>
auto by_type(const Tensor& x, F f) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 3, "tokens must be (b, tokens, d) on a CPU");
  switch (x.scalar_type()) {
    case ScalarType::Float: return f(float());
    case ScalarType::Double: return f(double());
    case ScalarType::Half: return f(torch::headeronly::Half());
    default: break;
  }
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::BFloat16, "tokens must be float32, float64, float16 or bfloat16");
  return f(torch::headeronly::BFloat16());
}

Tensor rows(const Tensor& x) {  // strided rows are fine, their elements lie together
  return x.dim() == 3 && x.stride(2) == 1 ? x : torch::stable::contiguous(x);
}

// position and fill come in the type that sums are made in
OptionalTensor beside(const OptionalTensor& value, const Tensor& x, std::vector<int64_t> size) {
  if (!value) return std::nullopt;
  const ScalarType type = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  bool fits = value->is_cpu() && value->scalar_type() == type && value->dim() == int64_t(size.size());
  for (size_t i = 0; fits && i < size.size(); ++i) fits = value->size(i) == size[i];
  STD_TORCH_CHECK(fits, "position must be (n, d) and fill (d,), float64 beside float64 and float32 beside the others");
  return torch::stable::contiguous(*value);
}

Tensor drop_tokens(Tensor x, Tensor ids, OptionalTensor position) {
  return by_type(x, [&](auto zero) {
    return drop<decltype(zero)>(rows(x), Ids(ids, x.size(0), x.size(1)), beside(position, x, {x.size(1), x.size(2)}));
  });
}

std::tuple<Tensor, Tensor> drop_tokens_backward(Tensor grad, Tensor ids, int64_t n, bool position) {
  return by_type(grad, [&](auto zero) {
    return drop_backward<decltype(zero)>(torch::stable::contiguous(grad), Ids(ids, grad.size(0), n), position);
  });
}

Tensor restore_tokens(Tensor y, Tensor ids, int64_t n, Tensor fill) {
  return by_type(y, [&](auto zero) {
    return restore<decltype(zero)>(rows(y), Ids(ids, y.size(0), n), *beside(fill, y, {y.size(2)}));
  });
}

std::tuple<Tensor, Tensor> restore_tokens_backward(Tensor grad, Tensor ids) {
  return by_type(grad, [&](auto zero) {
    return restore_backward<decltype(zero)>(torch::stable::contiguous(grad), Ids(ids, grad.size(0), grad.size(1)));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(MEDFAST_NAMESPACE, m) {
  m.def("drop_tokens(Tensor x, Tensor ids, Tensor? position) -> Tensor");
  m.def("drop_tokens_backward(Tensor grad, Tensor ids, SymInt n, bool position) -> (Tensor, Tensor)");
  m.def("restore_tokens(Tensor y, Tensor ids, SymInt n, Tensor fill) -> Tensor");
  m.def("restore_tokens_backward(Tensor grad, Tensor ids) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(MEDFAST_NAMESPACE, CPU, m) {
  m.impl("drop_tokens", TORCH_BOX(&drop_tokens));
  m.impl("drop_tokens_backward", TORCH_BOX(&drop_tokens_backward));
  m.impl("restore_tokens", TORCH_BOX(&restore_tokens));
  m.impl("restore_tokens_backward", TORCH_BOX(&restore_tokens_backward));
}
