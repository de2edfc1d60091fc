// What both directions do around a window: which block takes which windows, and where the tokens of one are.
#pragma once

#include "window_tile.h"

struct Block {  // of one head; takes every slots-th window of all samples
  int head, slot;
  DEVICE explicit Block(const WindowCall& call)
      : head(int(blockIdx.x % unsigned(call.heads))), slot(int(blockIdx.x / unsigned(call.heads))) {}
};

struct Places {  // in shared memory, of the 64 rows
  int token[kTokens], region[kTokens];
};

template <int kWide>
DEVICE void clear_tiles(uint16_t* tiles, int count) {  // channels beyond dim are zero and stay so
  for (int i = int(threadIdx.x) * 2; i < count * kTile<kWide>; i += 2 * kThreads)
    *reinterpret_cast<uint32_t*>(tiles + i) = 0;
}

// Fills in the rows of this warp; whether one of them is in another region than the first token of the grid.
DEVICE bool locate(const WindowCall& call, uint32_t window, const Within& within, const Lane& lane, Places& places) {
  const int row = lane.strip() + lane.index % kStrip;
  const Place place = place_of(call.plan, corner_of(call.plan, window), within, row);
  if (lane.index < kStrip) places.token[row] = place.token, places.region[row] = place.region;
  sync_warp();
  return place.region != 0;
}

template <class Element>
DEVICE Rows<Element> rows_of(const WindowCall& call, Element* base, int64_t sample, int head, int part, int parts) {
  const int64_t stride = int64_t(parts) * call.heads * call.dim;
  return {base + sample * call.plan.grid_tokens * stride + (int64_t(part) * call.heads + head) * call.dim, stride};
}
