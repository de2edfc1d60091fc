// One call of attention_mask as plain numbers and pointers.
#pragma once

#include <cstdint>

#include "../philox.h"

struct MaskCall {
  const float* attention;     // (batch, n)
  int64_t batch, n;
  int64_t count, top, shown;  // hidden before hints, of those the most attended, of those shown again
  const int64_t *counts, *shown_counts;  // (batch) or null: in place of count and shown
  bool low;                   // the lowest are hidden
  Philox philox;              // draws the tokens that are shown; without address all of the top are
  bool* nan_seen;             // set where there is a NaN, or null
  uint8_t* where;             // (batch, n)
  bool lists;                 // whether the ids are wanted: they are not where counts differ by sample
  int64_t *hidden, *visible;  // (batch, count - shown), (batch, n - count + shown)
};

void launch_mask(const MaskCall& call, void* stream);
