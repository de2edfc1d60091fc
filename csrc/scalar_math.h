// Functions of one float without branches, which loops over arrays turn into vectors. Internal linkage, because files
// compiled for different instruction sets include it.
#pragma once

#include <cstdint>

namespace {

template <class To, class From>
inline To same_bits(From from) {
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

// log(x), x > 0 and normal: x = 2^e m with m near 1, and the series of 2 artanh((m - 1) / (m + 1)).
[[maybe_unused]] inline float log_positive(float x) {
  const int32_t bits = same_bits<int32_t>(x), e = (bits - 0x3F3504F3) >> 23;  // m in [sqrt(1/2), sqrt(2))
  const float m = same_bits<float>(bits - e * (1 << 23)), s = (m - 1.0f) / (m + 1.0f), z = s * s;
  const float series = z * (1.0f / 3 + z * (1.0f / 5 + z * (1.0f / 7 + z * (1.0f / 9))));
  return float(e) * 0.693359375f + (float(e) * -2.12194440e-4f + (2.0f * s + 2.0f * s * series));
}

// exp(x), x <= 0: 2^n times the Taylor series of exp(r), |r| <= ln 2 / 2; 2e-38 below -87.
[[maybe_unused]] inline float exp_negative(float x) {
  const float y = x > -87.0f ? x : -87.0f, shifted = y * 1.44269504088896341f + 12582912.0f;  // low bits: n
  const float n = shifted - 12582912.0f, r = (y - n * 0.693359375f) - n * -2.12194440e-4f;
  const float head = 1.0f / 24 + r * (1.0f / 120 + r * (1.0f / 720 + r * (1.0f / 5040)));
  const float series = 1.0f + r * (1.0f + r * (0.5f + r * (1.0f / 6 + r * head)));
  return same_bits<float>(same_bits<uint32_t>(series) + (same_bits<uint32_t>(shifted) << 23));
}

}  // namespace
