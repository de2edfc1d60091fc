// Every operator of this library, and the instruction set that its CPU kernels run on.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "window_job.h"

struct InstructionSet {
  const char* name;
  const WindowKernel<float>* window_float;
  const WindowKernel<double>* window_double;
};
const InstructionSet& instruction_set();  // the best one that this build has and this processor runs

// (b, count) int64: the first numbers of each sample's draw; address (b, 3): sample, step, stream
torch::stable::Tensor philox_words(torch::stable::Tensor address, int64_t count, int64_t seed);

std::tuple<torch::stable::Tensor, torch::stable::Tensor> window_attention(
    torch::stable::Tensor qkv, std::optional<torch::stable::Tensor> bias, torch::stable::Tensor scale,
    std::optional<torch::stable::Tensor> pad_value, std::optional<torch::stable::Tensor> keep,
    std::optional<torch::stable::Tensor> draw, std::vector<int64_t> window, std::vector<int64_t> shift, bool cosine,
    bool live_pads, double dropout, int64_t seed);

std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor>
window_attention_backward(torch::stable::Tensor grad, torch::stable::Tensor out, torch::stable::Tensor lse,
                          torch::stable::Tensor qkv, std::optional<torch::stable::Tensor> bias,
                          torch::stable::Tensor scale, std::optional<torch::stable::Tensor> pad_value,
                          std::optional<torch::stable::Tensor> keep, std::optional<torch::stable::Tensor> draw,
                          std::vector<int64_t> window, std::vector<int64_t> shift, bool cosine, bool live_pads,
                          double dropout, int64_t seed);
