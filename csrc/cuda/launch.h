// Kernel launches, the same call for a GPU and for the emulation.
#pragma once

#include <stdexcept>
#include <string>

#include "device.h"



#ifdef MEDFAST_EMULATED

template <auto kernel, class... Arguments>
void launch(int64_t blocks, int threads, size_t shared, void*, Arguments... arguments) {
  emulated::run(blocks, threads, shared, [=] { kernel(arguments...); });
}

#else

inline void check(cudaError_t status, const char* doing) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(doing) + ": " + cudaGetErrorString(status));
}

template <auto kernel, class... Arguments>
void launch(int64_t blocks, int threads, size_t shared, void* stream, Arguments... arguments) {
  if (blocks == 0) return;
  if (shared > 48 * 1024)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)), "shared memory of a kernel");
  kernel<<<unsigned(blocks), threads, shared, static_cast<cudaStream_t>(stream)>>>(arguments...);
  check(cudaGetLastError(), "launch of a kernel");
}

#endif
