// A window of one head on chip: tiles of 64 rows in shared memory, of which each of four warps owns 16, and the products
// of tiles. Rows are 8 elements longer than the channels, which spreads any 8 of them over all banks.
#pragma once

#include "device.h"
#include "window_call.h"

constexpr int kWarps = 4, kThreads = kWarps * kWarp, kStrip = 16;  // kStrip: rows of a warp
constexpr int kKeyTiles = kTokens / 8;
constexpr size_t kMostShared = 99 * 1024;  // of a block, on every GPU from sm_80 on
constexpr float kLog2E = 1.4426950408889634f;

template <int kWide>
constexpr int kStride = kWide + 8;
template <int kWide>
constexpr int kTile = kTokens * kStride<kWide>;  // elements

struct Lane {
  int index, warp, group, pair;  // of an accumulator: rows group and group + 8, columns pair and pair + 1 of each 8
  DEVICE Lane()
      : index(int(threadIdx.x) % kWarp), warp(int(threadIdx.x) / kWarp), group(index / 4), pair(2 * (index % 4)) {}
  DEVICE int strip() const { return kStrip * warp; }
  // The row that load_matrices wants of this lane, of the four 8 x 8 tiles of a 16 x 16 one: first down, then right,
  DEVICE int down(int stride) const { return index % 16 * stride + 8 * (index / 16); }
  // or first right, then down.
  DEVICE int right(int stride) const { return (index % 8 + 8 * (index / 16)) * stride + 8 * (index / 8 % 2); }
};

// How the lanes of a warp share its rows of a head in memory: four channels each.
struct RowLanes {
  int row, step, channel, end;
  DEVICE RowLanes(const Lane& lane, int dim) {
    const int vectors = dim / 4, first = lane.index / vectors;
    step = kWarp / vectors, channel = 4 * (lane.index % vectors);
    row = lane.strip() + first, end = first < step ? lane.strip() + kStrip : 0;
  }
};

// Rows of one head and one sample in memory: where token 0 has its first channel, elements from token to token.
template <class Element>
struct Rows {
  Element* first;
  int64_t stride;
  DEVICE Element* at(int token) const { return first + token * stride; }
};

template <class T, int kWide>
DEVICE void load_rows(const Rows<const uint16_t>& from, const float* pad, const int* token, const RowLanes& lanes,
                      uint16_t* tile) {
  for (int row = lanes.row; row < lanes.end; row += lanes.step) {
    uint2 x{0, 0};
    if (token[row] >= 0) {
      x = *reinterpret_cast<const uint2*>(from.at(token[row]) + lanes.channel);
    } else if (token[row] == kPadded && pad) {
      const float* p = pad + lanes.channel;
      x = uint2{T::pack(p[0], p[1]), T::pack(p[2], p[3])};
    }
    *reinterpret_cast<uint2*>(tile + row * kStride<kWide> + lanes.channel) = x;
  }
}

template <int kWide>
DEVICE void store_rows(const uint16_t* tile, const Rows<uint16_t>& to, const int* token, const RowLanes& lanes) {
  for (int row = lanes.row; row < lanes.end; row += lanes.step)
    if (token[row] >= 0)
      *reinterpret_cast<uint2*>(to.at(token[row]) + lanes.channel) =
          *reinterpret_cast<const uint2*>(tile + row * kStride<kWide> + lanes.channel);
}

DEVICE void zero_rows(const Rows<uint16_t>& to, const int* token, const RowLanes& lanes) {
  for (int row = lanes.row; row < lanes.end; row += lanes.step)
    if (token[row] >= 0) *reinterpret_cast<uint2*>(to.at(token[row]) + lanes.channel) = uint2{0, 0};
}

// Accumulators of 16 rows of a tile, 8 columns each, into this warp's rows of it; not beyond dim, where a window with
// NaN would leave NaN to the next one
template <class T, int kWide>
DEVICE void store_strip(const float (&c)[kWide / 8][4], float first, float second, const Lane& lane, int dim,
                        uint16_t* tile) {
  uint16_t* at = tile + (lane.strip() + lane.group) * kStride<kWide> + lane.pair;
#pragma unroll
  for (int i = 0; i < kWide / 8; ++i) {
    if (8 * i + lane.pair >= dim) continue;
    *reinterpret_cast<uint32_t*>(at + 8 * i) = T::pack(c[i][0] * first, c[i][1] * first);
    *reinterpret_cast<uint32_t*>(at + 8 * kStride<kWide> + 8 * i) = T::pack(c[i][2] * second, c[i][3] * second);
  }
}

template <int kWide>
DEVICE void load_strip(const uint16_t* tile, const Lane& lane, uint32_t (&a)[kWide / 16][4]) {
#pragma unroll
  for (int k = 0; k < kWide / 16; ++k)
    load_matrices(a[k], tile + lane.strip() * kStride<kWide> + 16 * k + lane.down(kStride<kWide>));
}

// c (16 x 64) = a (16 x channels) times the rows of a tile
template <class T, int kWide>
DEVICE void times_rows(const uint32_t (&a)[kWide / 16][4], const uint16_t* tile, const Lane& lane,
                       float (&c)[kKeyTiles][4]) {
#pragma unroll
  for (int i = 0; i < kKeyTiles; i += 2) {
#pragma unroll
    for (int e = 0; e < 4; ++e) c[i][e] = c[i + 1][e] = 0;
#pragma unroll
    for (int k = 0; k < kWide / 16; ++k) {
      uint32_t b[4];
      load_matrices(b, tile + 8 * i * kStride<kWide> + 16 * k + lane.right(kStride<kWide>));
      T::multiply(c[i], a[k], b[0], b[1]);
      T::multiply(c[i + 1], a[k], b[2], b[3]);
    }
  }
}

// c (16 x channels) += a (16 x 16) times rows 16 k .. 16 k + 15 of a tile
template <class T, int kWide>
DEVICE void times_columns(const uint32_t (&a)[4], const uint16_t* tile, int k, const Lane& lane,
                          float (&c)[kWide / 8][4]) {
#pragma unroll
  for (int i = 0; i < kWide / 8; i += 2) {
    uint32_t b[4];
    load_matrices_transposed(b, tile + 16 * k * kStride<kWide> + 8 * i + lane.down(kStride<kWide>));
    T::multiply(c[i], a, b[0], b[1]);
    T::multiply(c[i + 1], a, b[2], b[3]);
  }
}

// Scores of 16 queries as the left operand of the next product, whose sum runs over the 64 keys
template <class T>
DEVICE void as_operand(const float (&c)[kKeyTiles][4], float factor, uint32_t (&a)[kKeyTiles / 2][4]) {
#pragma unroll
  for (int k = 0; k < kKeyTiles / 2; ++k)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float(&from)[4] = c[2 * k + e / 2];
      a[k][e] = T::pack(from[e % 2 * 2] * factor, from[e % 2 * 2 + 1] * factor);
    }
}

DEVICE float row_sum(float x) {  // over the four lanes that hold a row
  x += from_lane(x, 1);
  return x + from_lane(x, 2);
}

// Scores become exp2(score - largest of their row); inverse: 1 / sum, of the rows group and group + 8.
// bias: of this strip, in the order of the accumulators; region: of the 64 tokens, null where all see each other.
DEVICE void exponentials(const float4* bias, float scale, const int* region, const Lane& lane, float (&c)[kKeyTiles][4],
                         float (&inverse)[2]) {
  const float none = -__uint_as_float(0x7f800000u);
  float top[2] = {none, none}, sum[2] = {0, 0};
#pragma unroll
  for (int i = 0; i < kKeyTiles; ++i) {
    const float4 b = bias[i * kWarp + lane.index];
    c[i][0] = c[i][0] * scale + b.x, c[i][1] = c[i][1] * scale + b.y;
    c[i][2] = c[i][2] * scale + b.z, c[i][3] = c[i][3] * scale + b.w;
  }
  if (region) {
    const int own[2] = {region[lane.strip() + lane.group], region[lane.strip() + lane.group + 8]};
#pragma unroll
    for (int i = 0; i < kKeyTiles; ++i) {
      const int2 key = *reinterpret_cast<const int2*>(region + 8 * i + lane.pair);
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if ((e % 2 ? key.y : key.x) != own[e / 2]) c[i][e] = none;
    }
  }
#pragma unroll
  for (int i = 0; i < kKeyTiles; ++i)
#pragma unroll
    for (int e = 0; e < 4; ++e) top[e / 2] = max(top[e / 2], c[i][e]);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    top[r] = max(top[r], from_lane(top[r], 1));
    top[r] = max(top[r], from_lane(top[r], 2));
  }
#pragma unroll
  for (int i = 0; i < kKeyTiles; ++i)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      c[i][e] = exp2_fast(c[i][e] - top[e / 2]);
      sum[e / 2] += c[i][e];
    }
#pragma unroll
  for (int r = 0; r < 2; ++r) inverse[r] = 1.0f / row_sum(sum[r]);
}
