// Window attention on a GPU as torch operators. Kept for backward are the forward's inputs, nothing else.
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "operator.h"
#include "window_call.h"

namespace {

using OptionalTensor = std::optional<Tensor>;

#ifndef MEDFAST_BLOCKS
#define MEDFAST_BLOCKS 1584
#endif
constexpr int64_t kBlocks = MEDFAST_BLOCKS;  // about twelve for each multiprocessor of the largest GPU; of all heads together
constexpr int64_t kWindowsEach = 8;  // at least, in the backward: a block leaves 16 KB of sums behind

WindowPlan plan_of(const Tensor& qkv, const std::vector<int64_t>& window, const std::vector<int64_t>& shift, bool live_pads) {
  WindowPlan plan{};
  int64_t tokens = 1, windows = 1;
  plan.grid_tokens = 1, plan.live_pads = live_pads;
  for (size_t i = 0; i < window.size(); ++i) {
    const int64_t grid = qkv.size(1 + i), count = (grid + window[i] - 1) / window[i];
    WindowAxis& axis = plan.axis[3 - window.size() + i];
    axis.grid = int(grid), axis.window = int(window[i]), axis.padded = int(count * window[i]), axis.shift = int(shift[i]);
    axis.count = Divisor(uint32_t(count)), axis.within = Divisor(uint32_t(window[i]));
    tokens *= window[i], windows *= count, plan.grid_tokens *= grid;
  }
  STD_TORCH_CHECK(tokens <= kTokens, "windows of at most ", kTokens, " tokens have a CUDA kernel, this one has ", tokens);
  STD_TORCH_CHECK(windows * tokens <= std::numeric_limits<int32_t>::max(), "the token grid is too large: ",
                  windows * tokens, " tokens of one sample, padding included; the limit is 2**31 - 1");
  plan.tokens = int(tokens), plan.windows = Divisor(uint32_t(windows));
  return plan;
}

struct Inputs {  // keeps alive what the call points to
  Tensor qkv, scale, bias;
  OptionalTensor pad_value, keep;
  WindowCall call{};

  Inputs(const Tensor& qkv_, const OptionalTensor& bias_, const Tensor& scale_, const OptionalTensor& pad_value_,
         const OptionalTensor& keep_, const std::vector<int64_t>& window, const std::vector<int64_t>& shift,
         bool live_pads, int64_t windows_each)
      : qkv(dense(qkv_)), scale(dense(scale_)) {
    const ScalarType type = qkv.scalar_type();
    const int64_t axes = int64_t(window.size());
    STD_TORCH_CHECK(type == ScalarType::Half || type == ScalarType::BFloat16, "qkv must be float16 or bfloat16");
    call.plan = plan_of(qkv, window, shift, live_pads);
    call.batch = qkv.size(0), call.heads = int(qkv.size(2 + axes)), call.dim = int(qkv.size(3 + axes));
    call.units = call.batch * int64_t(call.plan.windows.divisor);
    call.wide = window_width(call.dim);
    STD_TORCH_CHECK(call.wide, "head dims with a CUDA kernel are multiples of 4 up to ", kMostWide, ", got ", call.dim);
    STD_TORCH_CHECK(call.units <= std::numeric_limits<int32_t>::max(), "too many windows: ", call.units);
    const int64_t most = ceil_div(kBlocks, call.heads), wanted = ceil_div(call.units, windows_each);
    call.slots = int(wanted < most ? wanted : most);
    call.bfloat16 = type == ScalarType::BFloat16;
    call.qkv = data<uint16_t>(qkv), call.scale = data<float>(scale);
    if (pad_value_ && live_pads) pad_value = dense(*pad_value_), call.pad_value = data<float>(*pad_value);
    if (keep_) keep = dense(*keep_), call.keep = data<bool>(*keep);
    bias = torch::stable::new_empty(scale, {call.heads, kBiasFloats});
    const Tensor given = bias_ ? dense(*bias_) : Tensor();
    launch_window_bias(bias_ ? data<float>(given) : nullptr, call.heads, call.plan.tokens, data<float>(bias), stream_of(qkv));
    call.bias = data<float>(bias);
  }
};

Tensor forward(Tensor qkv, OptionalTensor bias, Tensor scale, OptionalTensor pad_value, OptionalTensor keep,
               std::vector<int64_t> window, std::vector<int64_t> shift, bool live_pads) {
  const DeviceOf device(qkv);
  Inputs inputs(qkv, bias, scale, pad_value, keep, window, shift, live_pads, 1);
  std::vector<int64_t> size;
  for (size_t i = 0; i <= window.size(); ++i) size.push_back(qkv.size(i));
  size.push_back(int64_t(inputs.call.heads) * inputs.call.dim);
  Tensor out = torch::stable::new_empty(inputs.qkv, size);
  inputs.call.out = data<uint16_t>(out);
  if (inputs.call.units) launch_window_forward(inputs.call, stream_of(qkv));
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(Tensor grad, Tensor qkv, OptionalTensor bias, Tensor scale,
                                                    OptionalTensor pad_value, OptionalTensor keep,
                                                    std::vector<int64_t> window, std::vector<int64_t> shift, bool live_pads) {
  const DeviceOf device(qkv);
  Inputs inputs(qkv, bias, scale, pad_value, keep, window, shift, live_pads, kWindowsEach);
  WindowCall& call = inputs.call;
  const int64_t heads = call.heads, n = call.plan.tokens, dim = call.dim;
  const Tensor grad_out = dense(grad);
  Tensor grad_qkv = torch::stable::new_empty(inputs.qkv, inputs.qkv.sizes());
  call.grad_out = data<uint16_t>(grad_out), call.grad_qkv = data<uint16_t>(grad_qkv);
  call.bias_floats = bias ? kBiasFloats : 0, call.record = call.bias_floats + 2 * call.wide + 1;
  Tensor parts = torch::stable::new_empty(inputs.scale, {call.slots, heads, call.record});
  call.parts = data<float>(parts);
  Tensor grad_bias = torch::stable::new_empty(inputs.scale, bias ? std::vector<int64_t>{heads, n, n} : std::vector<int64_t>{0});
  Tensor grad_pad = torch::stable::new_zeros(inputs.scale, {3, heads, dim});  // no pad's query has a gradient
  Tensor grad_scale = torch::stable::new_empty(inputs.scale, {heads});
  if (call.units) launch_window_backward(call, stream_of(qkv));
  launch_window_fold(call, {bias ? data<float>(grad_bias) : nullptr, data<float>(grad_pad), data<float>(grad_scale)},
                     stream_of(qkv));
  return {grad_qkv, grad_bias, grad_pad, grad_scale};
}

}  // namespace

#define WINDOW_ARGUMENTS \
  "Tensor qkv, Tensor? bias, Tensor scale, Tensor? pad_value, Tensor? keep, int[] window, int[] shift, bool live_pads"

STABLE_TORCH_LIBRARY_FRAGMENT(MEDFAST_NAMESPACE, m) {
  m.def("window_attention_cuda(" WINDOW_ARGUMENTS ") -> Tensor");
  m.def("window_attention_cuda_backward(Tensor grad, " WINDOW_ARGUMENTS ") -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(MEDFAST_NAMESPACE, MEDFAST_GPU_KEY, m) {
  m.impl("window_attention_cuda", TORCH_BOX(&forward));
  m.impl("window_attention_cuda_backward", TORCH_BOX(&backward));
}
