// One call of window attention as plain numbers and pointers, and the geometry of its windows as arithmetic: a window
// is at most 64 tokens, which roll, partition and padding would have brought together (medfast_kernels/_window.py).
#pragma once

#include <cstdint>

#ifndef HOST_DEVICE
#define HOST_DEVICE
#endif

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int kTokens = 64;                             // of a window in the kernels, those beyond N are masked
constexpr int kBiasFloats = kTokens * kTokens;          // of one head, in the order of the accumulators
constexpr int kPadded = -1, kBeyond = -2;               // no token of the grid: padding; not even a place of the window
constexpr int kMostWide = 96;                           // channels of a head

struct Divisor {  // exact for dividends in [0, 2**31): Granlund and Montgomery, PLDI 1994
  uint32_t divisor = 1, magic = 0x80000000u, shift = 0;
  Divisor() = default;
  explicit Divisor(uint32_t d) : divisor(d) {
    while ((uint64_t(1) << shift) < d) ++shift;
    magic = uint32_t(((uint64_t(1) << (31 + shift)) + d - 1) / d);
  }
  HOST_DEVICE uint32_t quotient(uint32_t n) const { return uint32_t(uint64_t(n) * magic >> (31 + shift)); }
  HOST_DEVICE uint32_t remainder(uint32_t n) const { return n - quotient(n) * divisor; }
};

struct WindowAxis {  // of the grid, the padded and shifted one
  int grid = 1, window = 1, padded = 1, shift = 0;
  Divisor count, within;  // windows along the axis, tokens of one along it
};

struct WindowPlan {
  WindowAxis axis[3];
  int tokens;       // N
  bool live_pads;
  Divisor windows;  // of a sample
  int64_t grid_tokens;
};

struct Corner { int at[3]; };   // first place of a window, before the shift
struct Within { int at[3]; };   // place of a token in its window
struct Place {
  int token;   // of the grid, or kPadded, or kBeyond
  int region;  // tokens see each other where theirs are equal
};

HOST_DEVICE inline Corner corner_of(const WindowPlan& plan, uint32_t window) {
  Corner corner{};
  for (int i = 2; i >= 0; --i) {
    const WindowAxis& axis = plan.axis[i];
    corner.at[i] = int(axis.count.remainder(window)) * axis.window;
    window = axis.count.quotient(window);
  }
  return corner;
}

HOST_DEVICE inline Within within_of(const WindowPlan& plan, int row) {
  Within within{};
  uint32_t rest = row < plan.tokens ? row : 0;  // a row beyond N sees what row 0 sees: never nothing
  for (int i = 2; i >= 0; --i) {
    within.at[i] = int(plan.axis[i].within.remainder(rest));
    rest = plan.axis[i].within.quotient(rest);
  }
  return within;
}

HOST_DEVICE inline Place place_of(const WindowPlan& plan, const Corner& corner, const Within& within, int row) {
  Place place{0, 0};
  bool inside = true;
  for (int i = 0; i < 3; ++i) {
    const WindowAxis& axis = plan.axis[i];
    int at = corner.at[i] + within.at[i] + axis.shift;
    const bool wrapped = at >= axis.padded;
    if (wrapped) at -= axis.padded;
    inside = inside && at < axis.grid;
    place.token = place.token * axis.grid + at;
    place.region = 2 * place.region + wrapped;
  }
  const int slot = row < plan.tokens ? row : 0;
  if (!inside && !plan.live_pads) place.region = 8 + slot;  // a pad that must not be seen is a region of its own
  if (!inside) place.token = kPadded;
  if (row >= plan.tokens) place.token = kBeyond;
  return place;
}

struct BiasPlace { int query, key; };

// Element of the accumulators of the four warps of a head: warp, 8 keys, lane, 4 numbers
HOST_DEVICE inline BiasPlace bias_place(int index) {
  const int element = index % 4, lane = index / 4 % 32, keys = index / 128 % 8, warp = index / 1024;
  return {16 * warp + lane / 4 + 8 * (element / 2), 8 * keys + 2 * (lane % 4) + element % 2};
}

struct WindowCall {
  WindowPlan plan;
  int heads, dim;
  int64_t batch, units;    // units: windows of all samples
  int slots;               // blocks of one head, each takes every slots-th unit
  bool bfloat16;
  const uint16_t* qkv;     // (batch, grid_tokens, 3, heads, dim), 8-byte aligned like all of these
  const float* pad_value;  // (3, heads, dim) or null: zeros
  const float* bias;       // (heads, kBiasFloats) times log2 e, -inf for keys beyond N
  const float* scale;      // (heads)
  const bool* keep;        // (batch) or null
  uint16_t* out;           // (batch, grid_tokens, heads, dim)
  // backward only
  const uint16_t* grad_out;
  uint16_t* grad_qkv;
  float* parts;            // (slots, heads, record)
  int bias_floats;         // kBiasFloats, or 0 where nobody wants that gradient
  int record;              // bias_floats, then 2 x wide of the pads' k and v, then 1 of scale
  int wide;                // dim rounded up to what a kernel is made for
};

struct WindowGradients {  // what the parts of all slots sum up to
  float *bias, *pad_value, *scale;  // (heads, N, N) or null, (3, heads, dim), (heads)
};

// dim rounded up to what the kernels are made for, 0 if there is none
constexpr int window_width(int64_t dim) {
  if (dim < 1 || dim > kMostWide || dim % 4) return 0;
  return dim <= 16 ? 16 : dim <= 32 ? 32 : dim <= 48 ? 48 : dim <= 64 ? 64 : 96;
}

void launch_window_bias(const float* bias, int heads, int tokens, float* fragments, void* stream);
void launch_window_forward(const WindowCall& call, void* stream);
void launch_window_backward(const WindowCall& call, void* stream);
void launch_window_fold(const WindowCall& call, const WindowGradients& to, void* stream);
