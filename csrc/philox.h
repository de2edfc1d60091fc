// The one random generator. Internal linkage, because files compiled for different instruction sets include it.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define MEDFAST_BOTH __host__ __device__
#else
#define MEDFAST_BOTH
#endif

struct Philox {
  uint64_t seed;
  const int64_t* address;  // (batch, 3): sample, step, stream
};

namespace {

// Numbers 4 * block .. 4 * block + 3 of a draw; layout and source: medfast_kernels/key.py.
[[maybe_unused]] MEDFAST_BOTH inline void philox_block(const Philox& philox, int64_t sample, uint32_t block,
                                                       uint32_t (&word)[4]) {
  const int64_t* address = philox.address + 3 * sample;
  word[0] = block, word[1] = uint32_t(address[0]), word[2] = uint32_t(address[1]), word[3] = uint32_t(address[2]);
  uint32_t key0 = uint32_t(philox.seed), key1 = uint32_t(philox.seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t(word[0]) * 0xD2511F53u, product1 = uint64_t(word[2]) * 0xCD9E8D57u;
    const uint32_t first = uint32_t(product1 >> 32) ^ word[1] ^ key0, third = uint32_t(product0 >> 32) ^ word[3] ^ key1;
    word[0] = first, word[1] = uint32_t(product1), word[2] = third, word[3] = uint32_t(product0);
    key0 += 0x9E3779B9u, key1 += 0xBB67AE85u;
  }
}

}  // namespace
