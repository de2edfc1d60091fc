// The one random generator, many blocks at a time: short loops over arrays that the compiler turns into vectors.
#pragma once

#include "philox.h"

constexpr int kRandomGroup = 64;  // numbers made at once

namespace {

// The numbers of kRandomGroup / 4 consecutive blocks; layout and source: medfast_kernels/key.py.
[[maybe_unused]] void philox_group(const Philox& philox, int64_t sample, uint32_t first_block, uint32_t* out) {
  constexpr int kBlocks = kRandomGroup / 4;
  const int64_t* address = philox.address + 3 * sample;
  uint32_t word[4][kBlocks];
  for (int i = 0; i < kBlocks; ++i) {
    word[0][i] = first_block + uint32_t(i);
    for (int w = 1; w < 4; ++w) word[w][i] = uint32_t(address[w - 1]);
  }
  uint32_t key0 = uint32_t(philox.seed), key1 = uint32_t(philox.seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < kBlocks; ++i) {
      const uint64_t product0 = uint64_t(word[0][i]) * 0xD2511F53u, product1 = uint64_t(word[2][i]) * 0xCD9E8D57u;
      word[0][i] = uint32_t(product1 >> 32) ^ word[1][i] ^ key0;
      word[2][i] = uint32_t(product0 >> 32) ^ word[3][i] ^ key1;
      word[1][i] = uint32_t(product1), word[3][i] = uint32_t(product0);
    }
    key0 += 0x9E3779B9u, key1 += 0xBB67AE85u;
  }
  for (int i = 0; i < kBlocks; ++i)
    for (int w = 0; w < 4; ++w) out[4 * i + w] = word[w][i];
}

}  // namespace
