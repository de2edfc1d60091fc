// Numbers of the one random generator, a group at a time, for one instruction set: short loops over arrays that the
// compiler turns into vectors.
#include "random_kernel.h"

#include "philox_group.h"
#include "scalar_math.h"

namespace {

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
extern constexpr RandomKernel random_kernel{philox_group, normal};
}  // namespace MEDFAST_ISA
