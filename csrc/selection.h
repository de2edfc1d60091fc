// The largest keys of a row, found digit by digit, from the highest (radix select): no sort, and ties go to the lowest
// index.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

namespace {

// taken[i]: whether key i is one of the `count` largest of n, 0 <= count <= n. spare: room for n keys.
template <class K>
void take_largest(const K* keys, int64_t n, int64_t count, K* spare, bool* taken) {
  constexpr int kDigit = 8, kBins = 1 << kDigit, kCopies = 4;  // copies: neighbours with one digit need not wait
  if (count == 0) return void(std::fill_n(taken, n, false));
  const K* left = keys;  // those that share their first digits with the last one taken
  int64_t size = n, wanted = count;
  K least = 0;
  for (int shift = 8 * int(sizeof(K)) - kDigit; shift >= 0 && size > wanted; shift -= kDigit) {
    std::array<std::array<uint32_t, kBins>, kCopies> bins{};
    for (int64_t i = 0; i < size; ++i) ++bins[i % kCopies][(left[i] >> shift) & (kBins - 1)];
    int64_t digit = kBins, in_bin = 0;
    for (;;) {
      --digit, in_bin = 0;
      for (const auto& copy : bins) in_bin += copy[digit];
      if (in_bin >= wanted) break;
      wanted -= in_bin;
    }
    least |= K(digit) << shift;
    int64_t kept = 0;
    for (int64_t i = 0; i < size; ++i) {  // left may be spare: what is overwritten has been read
      const K key = left[i];
      spare[kept] = key;
      kept += ((key >> shift) & (kBins - 1)) == K(digit);
    }
    left = spare, size = kept;
  }
  for (int64_t i = 0; i < n; ++i) taken[i] = keys[i] >= least;
  for (int64_t i = n; size > wanted; --i) {  // more equal the last one taken than are wanted: not the last of them
    const bool equal = keys[i - 1] == least;
    taken[i - 1] &= !equal, size -= equal;
  }
}

}  // namespace
