// Window attention, forward. A block owns one head and walks over windows, a warp owns 16 queries: scores, softmax and
// the product with the values stay in registers, no score is ever written.
#include "launch.h"
#include "window_block.h"

namespace {

template <int kWide>
constexpr size_t kShared = 3 * kTile<kWide> * sizeof(uint16_t) + sizeof(Places);
static_assert(kShared<kMostWide> <= kMostShared);

template <class T, int kWide>
__global__ void __launch_bounds__(kThreads) forward(const WindowCall call) {
  SHARED_MEMORY(memory);
  uint16_t *const q = reinterpret_cast<uint16_t*>(memory), *const k = q + kTile<kWide>, *const v = k + kTile<kWide>;
  Places& places = *reinterpret_cast<Places*>(v + kTile<kWide>);
  const Lane lane;
  const Block block(call);
  const RowLanes lanes(lane, call.dim);
  const Within within = within_of(call.plan, lane.strip() + lane.index % kStrip);
  const float4* bias = reinterpret_cast<const float4*>(call.bias + block.head * int64_t(kBiasFloats)) +
                       lane.warp * kKeyTiles * kWarp;
  const float scale = call.scale[block.head] * kLog2E;
  clear_tiles<kWide>(q, 3);
  for (int64_t unit = block.slot; unit < call.units; unit += call.slots) {
    sync_block();  // nobody reads the window before any more
    const uint32_t sample = call.plan.windows.quotient(uint32_t(unit)), window = call.plan.windows.remainder(uint32_t(unit));
    const bool regions = locate(call, window, within, lane, places);
    const Rows<uint16_t> out = rows_of(call, call.out, sample, block.head, 0, 1);
    if (call.keep && !call.keep[sample]) {
      zero_rows(out, places.token, lanes);
      continue;
    }
    uint16_t* const tile[3] = {q, k, v};
#pragma unroll
    for (int part = 0; part < 3; ++part) {
      const float* pad = call.pad_value ? call.pad_value + (part * call.heads + block.head) * call.dim : nullptr;
      load_rows<T, kWide>(rows_of(call, call.qkv, sample, block.head, part, 3), pad, places.token, lanes, tile[part]);
    }
    const bool masked = any_in_block(regions);

    uint32_t a[kWide / 16][4], weights[kKeyTiles / 2][4];
    float c[kKeyTiles][4], inverse[2], o[kWide / 8][4] = {};
    load_strip<kWide>(q, lane, a);
    times_rows<T, kWide>(a, k, lane, c);
    exponentials(bias, scale, masked ? places.region : nullptr, lane, c, inverse);
    as_operand<T>(c, 1.0f, weights);
#pragma unroll
    for (int step = 0; step < kKeyTiles / 2; ++step) times_columns<T, kWide>(weights[step], v, step, lane, o);
    sync_warp();  // this warp's queries are read: their place takes the output
    store_strip<T, kWide>(o, inverse[0], inverse[1], lane, call.dim, q);
    sync_warp();
    store_rows<kWide>(q, out, places.token, lanes);
  }
}

template <class T>
void by_width(const WindowCall& call, void* stream) {
  const auto run = [&]<int kWide>() {
    launch<forward<T, kWide>>(int64_t(call.slots) * call.heads, kThreads, kShared<kWide>, stream, call);
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

// One thread per accumulator element: bias times log2 e, in the order in which lanes read it
__global__ void order_bias(const float* bias, int tokens, float* fragments) {
  const int at = int(blockIdx.x % (kBiasFloats / kThreads)) * kThreads + int(threadIdx.x);
  const int64_t head = blockIdx.x / (kBiasFloats / kThreads);
  const BiasPlace place = bias_place(at);
  const float b = bias && place.query < tokens && place.key < tokens
                      ? bias[(head * tokens + place.query) * tokens + place.key] * kLog2E
                      : 0.0f;
  fragments[head * kBiasFloats + at] = place.key < tokens ? b : -__uint_as_float(0x7f800000u);
}

}  // namespace

void launch_window_bias(const float* bias, int heads, int tokens, float* fragments, void* stream) {
  launch<order_bias>(int64_t(heads) * (kBiasFloats / kThreads), kThreads, 0, stream, bias, tokens, fragments);
}

void launch_window_forward(const WindowCall& call, void* stream) {
  call.bfloat16 ? by_width<Bfloat16>(call, stream) : by_width<Half>(call, stream);
}
