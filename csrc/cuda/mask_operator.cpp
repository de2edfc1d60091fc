// Attention masks on a GPU as a torch operator: one launch.
#include <limits>
#include <optional>
#include <tuple>

#include "mask_call.h"
#include "operator.h"

namespace {

using OptionalTensor = std::optional<Tensor>;

std::tuple<Tensor, Tensor, Tensor> attention_mask(Tensor attention, OptionalTensor nan_seen, OptionalTensor counts,
                                                  OptionalTensor shown_counts, OptionalTensor draw, int64_t count,
                                                  int64_t top, int64_t shown, bool low, int64_t seed) {
  const DeviceOf device(attention);
  STD_TORCH_CHECK(attention.scalar_type() == ScalarType::Float && attention.dim() == 2, "attention must be (b, n) float32");
  STD_TORCH_CHECK(attention.size(1) <= std::numeric_limits<int32_t>::max(), "attention has too many tokens: ", attention.size(1));
  const auto there = [](const OptionalTensor& x) { return x ? OptionalTensor(dense(*x)) : OptionalTensor(); };
  const Tensor values = dense(attention);
  const OptionalTensor hides = there(counts), shows = there(shown_counts), address = there(draw);
  const int64_t batch = attention.size(0), n = attention.size(1);
  const bool lists = !hides && !shows;
  Tensor where = torch::stable::new_empty(attention, {batch, n}, ScalarType::Bool);
  Tensor hidden = torch::stable::new_empty(attention, {batch, lists ? count - shown : 0}, ScalarType::Long);
  Tensor visible = torch::stable::new_empty(attention, {batch, lists ? n - count + shown : 0}, ScalarType::Long);
  MaskCall call{};
  call.attention = data<float>(values), call.batch = batch, call.n = n;
  call.count = count, call.top = top, call.shown = shown, call.low = low;
  call.counts = hides ? data<int64_t>(*hides) : nullptr, call.shown_counts = shows ? data<int64_t>(*shows) : nullptr;
  call.philox = {uint64_t(seed), address ? data<int64_t>(*address) : nullptr};
  call.nan_seen = nan_seen ? data<bool>(*nan_seen) : nullptr;
  call.where = data<uint8_t>(where);
  call.lists = lists, call.hidden = data<int64_t>(hidden), call.visible = data<int64_t>(visible);
  if (batch) launch_mask(call, stream_of(attention));
  return {where, hidden, visible};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(MEDFAST_NAMESPACE, m) {
  m.def(
      "attention_mask_cuda(Tensor attention, Tensor(a!)? nan_seen, Tensor? counts, Tensor? shown_counts, Tensor? draw, "
      "int count, int top, int shown, bool low, int seed) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(MEDFAST_NAMESPACE, MEDFAST_GPU_KEY, m) {
  m.impl("attention_mask_cuda", TORCH_BOX(&attention_mask));
}
