// The plan of windows on CPU: which token each place of each window is, see medfast_kernels/_window.py. Plain C++ that
// the operator computes with and module.cpp shows.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

struct Axis {  // of the grid: for each place on the padded, shifted axis
  int64_t grid = 1, window = 1, padded = 1, shift = 0;
  bool operator==(const Axis& other) const {
    return grid == other.grid && window == other.window && padded == other.padded && shift == other.shift;
  }
  int64_t at(int64_t place) const { return (place + shift) % padded; }
  bool wrapped(int64_t place) const { return place + shift >= padded; }
};
using Axes = std::array<Axis, 3>;

struct Plan {
  int64_t windows = 1, tokens = 1, grid_tokens = 1;  // of a sample; N, of a window; of a sample
  std::vector<int32_t> source;                       // (windows, N) token of the grid, -1 for padding
  std::vector<float> region;                         // (windows, N): tokens see each other if their regions are equal
  std::vector<uint8_t> masked;                       // (windows): more than one region inside
  // Chunks of windows that threads share, for each head: a function of the shape alone, so that sums over them are the
  // same bits on any number of threads. More would only make the sum of their bias gradients longer.
  int64_t chunks(int64_t batch, int64_t heads) const {
    return std::min(std::clamp<int64_t>(64 / heads, 4, 16), batch * windows);
  }
};

// window, shift: effective, one per grid axis; a 2D grid gets a first axis of length 1
inline Axes three_axes(const std::vector<int64_t>& grid, const std::vector<int64_t>& window,
                       const std::vector<int64_t>& shift) {
  Axes axes{};
  for (size_t i = 0; i < window.size(); ++i)
    axes[i + 3 - window.size()] = {grid[i], window[i], (grid[i] + window[i] - 1) / window[i] * window[i], shift[i]};
  return axes;
}

inline Plan make_plan(const Axes& axes, bool live_pads) {
  Plan plan;
  for (const Axis& axis : axes) {
    plan.windows *= axis.padded / axis.window;
    plan.tokens *= axis.window;
    plan.grid_tokens *= axis.grid;
  }
  if (plan.windows * plan.tokens >= std::numeric_limits<int32_t>::max())
    throw std::runtime_error("the token grid is too large: " + std::to_string(plan.windows * plan.tokens) +
                             " tokens of one sample, padding included; the limit is 2**31 - 1");
  plan.masked.assign(plan.windows, 0);
  plan.source.reserve(plan.windows * plan.tokens);
  plan.region.reserve(plan.windows * plan.tokens);
  const auto& [z, y, x] = axes;
  int64_t window = 0;
  for (int64_t wz = 0; wz < z.padded; wz += z.window)
    for (int64_t wy = 0; wy < y.padded; wy += y.window)
      for (int64_t wx = 0; wx < x.padded; wx += x.window, ++window) {
        const size_t first = plan.region.size();
        for (int64_t pz = wz; pz < wz + z.window; ++pz)
          for (int64_t py = wy; py < wy + y.window; ++py)
            for (int64_t px = wx; px < wx + x.window; ++px) {
              const bool inside = z.at(pz) < z.grid && y.at(py) < y.grid && x.at(px) < x.grid;
              const int64_t token = (z.at(pz) * y.grid + y.at(py)) * x.grid + x.at(px);
              plan.source.push_back(inside ? int32_t(token) : -1);
              const int region = 4 * z.wrapped(pz) + 2 * y.wrapped(py) + x.wrapped(px);
              // a pad token that must not be seen is a region of its own
              plan.region.push_back(inside || live_pads ? float(region) : float(8 + plan.region.size() - first));
              plan.masked[window] |= plan.region.back() != plan.region[first];
            }
      }
  return plan;
}
