// Window attention, backward. Blocks and warps own what they own in the forward; scores are computed again, nothing but
// the forward's inputs is kept. The gradient of the bias stays in registers while its block walks over windows; blocks
// leave their sums side by side and a second kernel adds them up in a fixed order: no atomics, the same bits every time.
#include "launch.h"
#include "window_block.h"

namespace {

constexpr int kScoreStride = kTokens + 8;

template <int kWide>
constexpr int kPads = (kWide + kWarp - 1) / kWarp;  // columns whose sum over the pads a lane keeps

// Scores of this warp's 16 queries into a 64 x 64 tile
DEVICE void store_scores(const uint32_t (&a)[kKeyTiles / 2][4], const Lane& lane, uint16_t* tile) {
  uint16_t* at = tile + (lane.strip() + lane.group) * kScoreStride + lane.pair;
#pragma unroll
  for (int k = 0; k < kKeyTiles / 2; ++k)
#pragma unroll
    for (int e = 0; e < 4; ++e)
      *reinterpret_cast<uint32_t*>(at + e % 2 * 8 * kScoreStride + 16 * k + e / 2 * 8) = a[k][e];
}

// c (16 keys x channels) = transposed columns of this warp's keys in a 64 x 64 tile of scores, times the rows of a tile
template <class T, int kWide>
DEVICE void keys_product(const uint16_t* scores, const uint16_t* tile, const Lane& lane, float (&c)[kWide / 8][4]) {
#pragma unroll
  for (int i = 0; i < kWide / 8; ++i)
#pragma unroll
    for (int e = 0; e < 4; ++e) c[i][e] = 0;
#pragma unroll(kWide > 64 ? 1 : kTokens / 16)  // wide heads need the registers
  for (int k = 0; k < kTokens / 16; ++k) {
    uint32_t a[4];
    load_matrices_transposed(a, scores + 16 * k * kScoreStride + lane.strip() + lane.right(kScoreStride));
    times_columns<T, kWide>(a, tile, k, lane, c);
  }
}

// c becomes the gradient of the scores: softmax backward, with P of them in p and dP in c
DEVICE void softmax_backward(const float (&p)[kKeyTiles][4], float (&c)[kKeyTiles][4]) {
  float along[2] = {0, 0};
#pragma unroll
  for (int i = 0; i < kKeyTiles; ++i)
#pragma unroll
    for (int e = 0; e < 4; ++e) along[e / 2] += p[i][e] * c[i][e];
  along[0] = row_sum(along[0]), along[1] = row_sum(along[1]);
#pragma unroll
  for (int i = 0; i < kKeyTiles; ++i)
#pragma unroll
    for (int e = 0; e < 4; ++e) c[i][e] = p[i][e] * (c[i][e] - along[e / 2]);
}

// sum of q times its gradient, whose accumulators lie as the left operand does
template <class T, int kWide>
DEVICE float inner(const uint32_t (&q)[kWide / 16][4], const float (&c)[kWide / 8][4]) {
  float sum = 0;
#pragma unroll
  for (int k = 0; k < kWide / 16; ++k)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float2 x = T::unpack(q[k][e]);
      const float(&g)[4] = c[2 * k + e / 2];
      sum += x.x * g[e % 2 * 2] + x.y * g[e % 2 * 2 + 1];
    }
  return sum;
}

// Adds the padding tokens among this warp's rows, one or more columns per lane
template <class T, int kWide>
DEVICE void add_pads(const uint16_t* tile, const int* token, const Lane& lane, float (&sum)[kPads<kWide>]) {
  for (int row = lane.strip(); row < lane.strip() + kStrip; ++row)
    if (token[row] == kPadded)
#pragma unroll
      for (int i = 0; i < kPads<kWide>; ++i)
        if (lane.index + i * kWarp < kWide) sum[i] += T::unpack(tile[row * kStride<kWide> + lane.index + i * kWarp]).x;
}

template <class T, int kWide>
struct Backward {
  const WindowCall& call;
  const Lane lane;
  const Block block;
  const RowLanes lanes;
  uint16_t *const q, *const k, *const v, *const grad_out, *const weights, *const grad_scores;
  Places& places;
  const float scale, fold;  // fold goes into 16 bits with the gradient of the scores and keeps that in range
  float grad_bias[kKeyTiles][4] = {}, pads_k[kPads<kWide>] = {}, pads_v[kPads<kWide>] = {}, grad_scale = 0;

  static constexpr size_t kShared = (4 * kTile<kWide> + 2 * kTokens * kScoreStride) * sizeof(uint16_t) + sizeof(Places);

  DEVICE Backward(const WindowCall& call, unsigned char* memory)
      : call(call), block(call), lanes(lane, call.dim), q(reinterpret_cast<uint16_t*>(memory)), k(q + kTile<kWide>),
        v(k + kTile<kWide>), grad_out(v + kTile<kWide>), weights(grad_out + kTile<kWide>),
        grad_scores(weights + kTokens * kScoreStride),
        places(*reinterpret_cast<Places*>(grad_scores + kTokens * kScoreStride)), scale(call.scale[block.head]),
        fold(scale == 0.0f ? 1.0f : scale) {}

  DEVICE Rows<const uint16_t> input(uint32_t sample, int part) const {
    return rows_of(call, call.qkv, sample, block.head, part, 3);
  }
  DEVICE Rows<uint16_t> gradient(uint32_t sample, int part) const {
    return rows_of(call, call.grad_qkv, sample, block.head, part, 3);
  }
  DEVICE const float* pad(int part) const {
    return call.pad_value ? call.pad_value + (part * call.heads + block.head) * call.dim : nullptr;
  }
  DEVICE void load(uint32_t sample) const {
    load_rows<T, kWide>(input(sample, 0), pad(0), places.token, lanes, q);
    load_rows<T, kWide>(input(sample, 1), pad(1), places.token, lanes, k);
    load_rows<T, kWide>(input(sample, 2), pad(2), places.token, lanes, v);
    const Rows<const uint16_t> rows = rows_of(call, call.grad_out, sample, block.head, 0, 1);
    load_rows<T, kWide>(rows, nullptr, places.token, lanes, grad_out);
  }

  // 16 queries of this warp: their gradient, and weights and gradient of their scores for the keys of all warps
  DEVICE void queries(const float4* bias, bool masked, float (&grad_q)[kWide / 8][4]) {
    uint32_t a[kWide / 16][4], operand[kKeyTiles / 2][4];
    float p[kKeyTiles][4], c[kKeyTiles][4], inverse[2];
    load_strip<kWide>(q, lane, a);
    times_rows<T, kWide>(a, k, lane, p);
    exponentials(bias, scale * kLog2E, masked ? places.region : nullptr, lane, p, inverse);
#pragma unroll
    for (int i = 0; i < kKeyTiles; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) p[i][e] *= inverse[e / 2];
    as_operand<T>(p, 1.0f, operand);
    store_scores(operand, lane, weights);
    load_strip<kWide>(grad_out, lane, a);
    times_rows<T, kWide>(a, v, lane, c);
    softmax_backward(p, c);
#pragma unroll
    for (int i = 0; i < kKeyTiles; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) grad_bias[i][e] += c[i][e];
    as_operand<T>(c, fold, operand);
    store_scores(operand, lane, grad_scores);
#pragma unroll
    for (int i = 0; i < kWide / 8; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) grad_q[i][e] = 0;
#pragma unroll
    for (int step = 0; step < kKeyTiles / 2; ++step) times_columns<T, kWide>(operand[step], k, step, lane, grad_q);
    load_strip<kWide>(q, lane, a);
    grad_scale += inner<T, kWide>(a, grad_q);
  }

  // 16 keys of this warp: their gradients take the place of keys and values, which nobody needs any more
  DEVICE void keys() const {
    float c[kWide / 8][4];
    keys_product<T, kWide>(weights, grad_out, lane, c);
    store_strip<T, kWide>(c, 1.0f, 1.0f, lane, call.dim, v);
    keys_product<T, kWide>(grad_scores, q, lane, c);
    store_strip<T, kWide>(c, scale / fold, scale / fold, lane, call.dim, k);
    sync_warp();
  }

  DEVICE void write(uint32_t sample, const float (&grad_q)[kWide / 8][4]) {
    store_rows<kWide>(k, gradient(sample, 1), places.token, lanes);
    store_rows<kWide>(v, gradient(sample, 2), places.token, lanes);
    if (call.pad_value) {
      add_pads<T, kWide>(k, places.token, lane, pads_k);
      add_pads<T, kWide>(v, places.token, lane, pads_v);
    }
    sync_warp();  // the rows of a tile once more, now for the queries
    store_strip<T, kWide>(grad_q, scale / fold, scale / fold, lane, call.dim, v);
    sync_warp();
    store_rows<kWide>(v, gradient(sample, 0), places.token, lanes);
  }

  // What this block has summed up, the four warps in their order
  DEVICE void finish() {
    float* const part = call.parts + (int64_t(block.slot) * call.heads + block.head) * call.record;
    if (call.bias_floats)
#pragma unroll
      for (int i = 0; i < kKeyTiles; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) part[((lane.warp * kKeyTiles + i) * kWarp + lane.index) * 4 + e] = grad_bias[i][e];
    constexpr int kSums = 2 * kWide + 1;
    float* const sums = reinterpret_cast<float*>(q);  // the windows are done
    for (int step = kWarp / 2; step > 0; step /= 2) grad_scale += from_lane(grad_scale, step);
    sync_block();
    if (lane.index == 0) sums[lane.warp * kSums + 2 * kWide] = grad_scale / fold;
#pragma unroll
    for (int i = 0; i < kPads<kWide>; ++i) {
      const int column = lane.index + i * kWarp;
      if (column < kWide) sums[lane.warp * kSums + column] = pads_k[i], sums[lane.warp * kSums + kWide + column] = pads_v[i];
    }
    sync_block();
    for (int i = int(threadIdx.x); i < kSums; i += kThreads) {
      float sum = 0;
      for (int warp = 0; warp < kWarps; ++warp) sum += sums[warp * kSums + i];
      part[call.bias_floats + i] = sum;
    }
  }
};

template <class T, int kWide>
__global__ void __launch_bounds__(kThreads) backward(const WindowCall call) {
  SHARED_MEMORY(memory);
  Backward<T, kWide> work(call, memory);
  const Lane& lane = work.lane;
  const Within within = within_of(call.plan, lane.strip() + lane.index % kStrip);
  const float4* bias = reinterpret_cast<const float4*>(call.bias + work.block.head * int64_t(kBiasFloats)) +
                       lane.warp * kKeyTiles * kWarp;
  clear_tiles<kWide>(work.q, 4);
  for (int64_t unit = work.block.slot; unit < call.units; unit += call.slots) {
    sync_block();  // nobody reads the window before any more
    const uint32_t sample = call.plan.windows.quotient(uint32_t(unit)), window = call.plan.windows.remainder(uint32_t(unit));
    const bool regions = locate(call, window, within, lane, work.places);
    if (call.keep && !call.keep[sample]) {
      for (int part = 0; part < 3; ++part) zero_rows(work.gradient(sample, part), work.places.token, work.lanes);
      continue;
    }
    work.load(sample);
    const bool masked = any_in_block(regions);
    float grad_q[kWide / 8][4];
    work.queries(bias, masked, grad_q);
    sync_block();  // weights of all queries are there, keys and values are read
    work.keys();
    work.write(sample, grad_q);
  }
  work.finish();
}

static_assert(Backward<Half, kMostWide>::kShared <= kMostShared);

template <class T>
void by_width(const WindowCall& call, void* stream) {
  const auto run = [&]<int kWide>() {
    launch<backward<T, kWide>>(int64_t(call.slots) * call.heads, kThreads, Backward<T, kWide>::kShared, stream, call);
  };
  switch (call.wide) {
    case 16: return run.template operator()<16>();
    case 32: return run.template operator()<32>();
    case 48: return run.template operator()<48>();
    case 64: return run.template operator()<64>();
    case 96: return run.template operator()<96>();
    default: throw std::runtime_error("no kernel of this head dim");
  }
}

// One thread per element of a head's record: the sum over slots, in their order, to where it belongs
__global__ void fold(const WindowCall call, const WindowGradients to) {
  const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int head = int(index / call.record), at = int(index % call.record), tokens = call.plan.tokens;
  if (head >= call.heads) return;
  const int pad = at - call.bias_floats, part = 1 + pad / call.wide, channel = pad % call.wide;
  float* target = nullptr;
  if (pad < 0) {
    const BiasPlace place = bias_place(at);
    if (place.query < tokens && place.key < tokens)
      target = to.bias + (int64_t(head) * tokens + place.query) * tokens + place.key;
  } else if (pad == 2 * call.wide) {
    target = to.scale + head;
  } else if (channel < call.dim) {
    target = to.pad_value + (part * call.heads + head) * call.dim + channel;
  }
  if (!target) return;
  float sum = 0;
  for (int slot = 0; slot < call.slots; ++slot) sum += call.parts[(int64_t(slot) * call.heads + head) * call.record + at];
  *target = sum;
}

}  // namespace

void launch_window_backward(const WindowCall& call, void* stream) {
  call.bfloat16 ? by_width<Bfloat16>(call, stream) : by_width<Half>(call, stream);
}

void launch_window_fold(const WindowCall& call, const WindowGradients& to, void* stream) {
  launch<fold>(ceil_div(int64_t(call.heads) * call.record, kThreads), kThreads, 0, stream, call, to);
}
