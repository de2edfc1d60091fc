// Attention masks: one block per sample finds who is hidden and who is shown again by radix select, digit by digit, and
// writes the mask and both lists of ids. Nothing is sorted, nobody waits for the host. Counters are integers in shared
// memory, so that the order of their atomics does not matter.
#include "launch.h"
#include "mask_call.h"

namespace {

constexpr int kBins = 256, kMostThreads = 1024;
constexpr int kHides = 1, kTop = 2;  // bits of a token while the kernel runs

struct Shared {
  uint32_t bins[kBins], digit, rest, sums[kMostThreads / kWarp];
};

// Taken are all keys above the threshold, and the first `ties` of those that equal it.
struct Cut {
  uint32_t threshold, ties;
};

struct Team {  // the threads of a block
  Shared& shared;
  int thread, lane, warp, threads;
  DEVICE explicit Team(Shared& shared)
      : shared(shared), thread(int(threadIdx.x)), lane(thread % kWarp), warp(thread / kWarp), threads(int(blockDim.x)) {}

  // Sum over the threads before this one; total: over all
  DEVICE uint32_t before(uint32_t mine, uint32_t& total) const {
    uint32_t sum = mine;
    for (int step = 1; step < kWarp; step *= 2) {
      const uint32_t below = from_lane_below(sum, step);
      if (lane >= step) sum += below;
    }
    sync_block();  // the sums of the time before are read
    if (lane == kWarp - 1) shared.sums[warp] = sum;
    sync_block();
    uint32_t lower = 0;
    total = 0;
    for (int w = 0; w < threads / kWarp; ++w) {
      if (w < warp) lower += shared.sums[w];
      total += shared.sums[w];
    }
    return lower + sum - mine;
  }

  // The first warp finds the bin, from the highest, in which number `rest` lies, and its number there
  DEVICE void find_digit(uint32_t rest) const {
    uint32_t size = 0;
    const int first = kBins - 1 - lane * (kBins / kWarp);
    for (int i = 0; i < kBins / kWarp; ++i) size += shared.bins[first - i];
    uint32_t sum = size;
    for (int step = 1; step < kWarp; step *= 2) {
      const uint32_t below = from_lane_below(sum, step);
      if (lane >= step) sum += below;
    }
    uint32_t seen = sum - size;
    if (seen >= rest || sum < rest) return;
    int digit = first;
    for (; seen + shared.bins[digit] < rest; --digit) seen += shared.bins[digit];
    shared.digit = uint32_t(digit), shared.rest = rest - seen;
  }

  // The cut that takes the `count` largest keys; key(i, k): whether token i takes part, and its key
  template <class Key>
  DEVICE Cut largest(int64_t n, int64_t count, const Key& key) const {
    if (count <= 0) return {0xffffffffu, 0};
    uint32_t prefix = 0, rest = uint32_t(count);
    for (int shift = 24; shift >= 0; shift -= 8) {
      for (int i = thread; i < kBins; i += threads) shared.bins[i] = 0;
      sync_block();
      for (int64_t i = thread; i < n; i += threads) {
        uint32_t k = 0;
        if (key(i, k) && uint64_t(k) >> (shift + 8) == uint64_t(prefix) >> (shift + 8))
          count_up(&shared.bins[k >> shift & (kBins - 1)]);
      }
      sync_block();
      if (warp == 0) find_digit(rest);
      sync_block();
      prefix |= shared.digit << shift, rest = shared.rest;
    }
    return {prefix, rest};
  }
};

struct Sample {
  const MaskCall& call;
  const int64_t index;
  const float* attention;
  uint8_t* where;

  DEVICE Sample(const MaskCall& call, int64_t index)
      : call(call), index(index), attention(call.attention + index * call.n), where(call.where + index * call.n) {}

  // Larger is hidden first; the same number for what is equal: both zeros, NaN and the least of all
  DEVICE uint32_t rank_key(int64_t i, bool& nan) const {
    float x = call.low ? -attention[i] : attention[i];
    nan = x != x;
    if (nan) x = -__uint_as_float(0x7f800000u);
    if (x == 0.0f) x = 0.0f;
    const uint32_t bits = __float_as_uint(x);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
  }
  DEVICE uint32_t draw_key(int64_t i) const {  // larger is shown first: the smallest number
    uint32_t word[4];
    philox_block(call.philox, index, uint32_t(i / 4), word);
    const int at = int(i % 4);
    return ~(at == 0 ? word[0] : at == 1 ? word[1] : at == 2 ? word[2] : word[3]);
  }
};

// Who is hidden before hints and who is among the top, as bits of `where`. Ties are counted in the order of tokens.
DEVICE void mark(const Team& team, const Sample& sample, const Cut& hides, const Cut& top) {
  uint32_t hides_before = 0, top_before = 0;
  bool any_nan = false;
  for (int64_t base = 0; base < sample.call.n; base += team.threads) {
    const int64_t i = base + team.thread;
    const bool there = i < sample.call.n;
    bool nan = false;
    const uint32_t key = there ? sample.rank_key(i, nan) : 0;
    const bool hides_tie = there && key == hides.threshold, top_tie = there && key == top.threshold;
    uint32_t total = 0;
    const uint32_t ties = team.before(uint32_t(hides_tie) | uint32_t(top_tie) << 16, total);
    const bool hidden = key > hides.threshold || (hides_tie && hides_before + (ties & 0xffffu) < hides.ties);
    const bool in_top = key > top.threshold || (top_tie && top_before + (ties >> 16) < top.ties);
    if (there) sample.where[i] = uint8_t((hidden ? kHides : 0) | (in_top ? kTop : 0));
    hides_before += total & 0xffffu, top_before += total >> 16;
    any_nan = any_nan || nan;
  }
  if (any_in_block(any_nan) && team.thread == 0 && sample.call.nan_seen) *sample.call.nan_seen = true;
}

// The mask and the ids, from the bits and the draw among the top
DEVICE void write(const Team& team, const Sample& sample, const Cut& shown) {
  const MaskCall& call = sample.call;
  int64_t* const hidden = call.hidden + sample.index * (call.count - call.shown);
  int64_t* const visible = call.visible + sample.index * (call.n - call.count + call.shown);
  uint32_t ties_before = 0, hidden_before = 0;
  for (int64_t base = 0; base < call.n; base += team.threads) {
    const int64_t i = base + team.thread;
    const uint8_t bits = i < call.n ? sample.where[i] : 0;
    bool shows = bits & kTop;
    if (call.philox.address) {
      const uint32_t key = shows ? sample.draw_key(i) : 0;
      const bool tie = shows && key == shown.threshold;
      uint32_t total = 0;
      const uint32_t before = ties_before + team.before(tie, total);
      shows = shows && (key > shown.threshold || (tie && before < shown.ties));
      ties_before += total;
    }
    const bool hides = (bits & kHides) && !shows;
    uint32_t total = 0;
    const int64_t before = int64_t(hidden_before) + team.before(hides, total);
    hidden_before += total;
    if (i >= call.n) continue;
    sample.where[i] = hides;
    if (call.lists) (hides ? hidden[before] : visible[i - before]) = i;
  }
}

__global__ void __launch_bounds__(kMostThreads, 1) mask(const MaskCall call) {
  SHARED_MEMORY(memory);
  const Team team(*reinterpret_cast<Shared*>(memory));
  const Sample sample(call, blockIdx.x);
  const int64_t count = call.counts ? call.counts[sample.index] : call.count;
  const int64_t shown = call.shown_counts ? call.shown_counts[sample.index] : call.shown;
  const auto rank_key = [&](int64_t i, uint32_t& key) {
    bool nan;
    key = sample.rank_key(i, nan);
    return true;
  };
  const auto draw_key = [&](int64_t i, uint32_t& key) {
    const bool in_top = sample.where[i] & kTop;
    if (in_top) key = sample.draw_key(i);
    return in_top;
  };
  const Cut hides = team.largest(call.n, count, rank_key);
  const Cut top = team.largest(call.n, call.top, rank_key);
  mark(team, sample, hides, top);
  // each thread reads the bits that it has written itself
  const Cut drawn = call.philox.address ? team.largest(call.n, min(shown, call.top), draw_key) : Cut{0xffffffffu, 0};
  write(team, sample, drawn);
}

}  // namespace

void launch_mask(const MaskCall& call, void* stream) {
  launch<mask>(call.batch, call.n <= kMostThreads ? 256 : kMostThreads, sizeof(Shared), stream, call);
}
