// Numbers of the one random generator, a group at a time, for one instruction set: short loops over arrays that the
// compiler turns into vectors.
#include "random_kernel.h"

#include "philox.h"
#include "scalar_math.h"

namespace {

constexpr int kBlocks = kRandomGroup / 4;

// Philox-4x32-10 on kBlocks consecutive blocks; layout and source: medfast_kernels/key.py
void words(const Philox& philox, int64_t sample, uint32_t first_block, uint32_t* out) {
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

// cos and sin of 0 <= x <= 2 pi: Taylor series around the nearest multiple of pi / 2.
inline void cos_sin(float x, float& cos, float& sin) {
  const int32_t quarter = int32_t(x * 0.63661977236758134f + 0.5f);
  const float q = float(quarter), r = ((x - q * 1.5703125f) - q * 4.83751296997e-4f) - q * 7.54978995489e-8f, z = r * r;
  const float c = 1.0f - z * (0.5f - z * (1.0f / 24 - z * (1.0f / 720 - z * (1.0f / 40320))));
  const float s = r - r * z * (1.0f / 6 - z * (1.0f / 120 - z * (1.0f / 5040 - z * (1.0f / 362880))));
  const bool odd = quarter & 1;
  const float along = odd ? s : c, across = odd ? c : s;
  cos = (quarter + 1) & 2 ? -along : along;
  sin = quarter & 2 ? -across : across;
}

// Box-Muller on words 2i and 2i + 1. The angle is rounded to fp32 first, as the definition has it.
void normal(const uint32_t* word, float* out) {
  constexpr int kPairs = kRandomGroup / 2;
  float radius[kPairs], angle[kPairs], cos[kPairs], sin[kPairs];
  for (int i = 0; i < kPairs; ++i) {
    radius[i] = -2.0f * log_positive(float(int32_t(word[2 * i] >> 8)) * 0x1p-24f + 0x1p-24f);
    angle[i] = 6.28318530717958648f * (float(int32_t(word[2 * i + 1] >> 8)) * 0x1p-24f);
  }
  for (int i = 0; i < kPairs; ++i) radius[i] = __builtin_sqrtf(radius[i] > 0 ? radius[i] : 0.0f);
  for (int i = 0; i < kPairs; ++i) cos_sin(angle[i], cos[i], sin[i]);
  for (int i = 0; i < kPairs; ++i) out[2 * i] = radius[i] * cos[i], out[2 * i + 1] = radius[i] * sin[i];
}

}  // namespace

namespace MEDFAST_ISA {
extern constexpr RandomKernel random_kernel{words, normal};
}  // namespace MEDFAST_ISA
