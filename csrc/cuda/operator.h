// What operators on a GPU share: tensors as pointers, the current stream. Under emulation they are operators on CPU.
#pragma once

#include <cstdint>
#include <memory>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#ifdef MEDFAST_EMULATED
#define MEDFAST_GPU_KEY CPU
#else
#define MEDFAST_GPU_KEY CUDA
#include <dlfcn.h>
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
T* data(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

// Contiguous and aligned to the 16 bytes that kernels read at a time
[[maybe_unused]] inline Tensor dense(const Tensor& x) {
  const Tensor contiguous = torch::stable::contiguous(x);
  return reinterpret_cast<uintptr_t>(contiguous.mutable_data_ptr()) % 16 ? torch::stable::clone(contiguous) : contiguous;
}

#ifdef MEDFAST_EMULATED
struct DeviceOf {
  explicit DeviceOf(const Tensor&) {}
};
[[maybe_unused]] inline void* stream_of(const Tensor&) { return nullptr; }
#else
struct DeviceOf {  // the current device while it lives
  torch::stable::accelerator::DeviceGuard guard;
  explicit DeviceOf(const Tensor& x) : guard(x.get_device()) {}
};
// Looked up in the torch that is loaded: one without CUDA lacks it, and this library has to load there all the same.
// A weak reference would not do, because the CUDA part of torch is in nobody's scope but its own.
[[maybe_unused]] inline void* stream_of(const Tensor& x) {
  using Ask = AOTITorchError (*)(int32_t device_index, void** stream);
  static const Ask ask = [] {
    void* const torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<Ask>(torch_cuda ? dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream") : nullptr);
  }();
  STD_TORCH_CHECK(ask, "this torch has no CUDA: no libtorch_cuda.so with aoti_torch_get_current_cuda_stream is loaded");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(ask(x.get_device(), &stream));
  return stream;
}
#endif

}  // namespace
