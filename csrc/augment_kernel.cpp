// A view of an int16 box, for one instruction set. Planes are made one after another in caches: each plane of the box is
// windowed and resized once, blurred along its two axes, and waits in a ring for its neighbours along the third; memory
// sees the box once and the view once. Voxels do not depend on how planes are shared out.
#include "augment_kernel.h"

#include "lanes.h"
#include "random_kernel.h"
#include "scalar_math.h"

namespace {

constexpr int kWide = 4;  // vectors of a row that are summed at a time
constexpr int64_t kPitch = 16;  // rows in scratch are whole vectors of any width

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t greater(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE float clamp01(float x) { return x < 0.0f ? 0.0f : x > 1.0f ? 1.0f : x; }

// Index i of an axis of n voxels that is mirrored at both ends without repeating them
int64_t mirrored(int64_t i, int64_t n) {
  if (n == 1) return 0;
  const int64_t period = 2 * (n - 1), at = (i < 0 ? -i : i) % period;
  return smaller(at, period - at);
}

// Where voxel i of an axis lies between two of the box: linear between centres, the outer half voxels constant
struct Tap {
  int64_t first, second;
  float share;  // of the second

  Tap(int64_t i, int64_t extent, int64_t size) {
    const double at = (double(i) + 0.5) * double(extent) / double(size) - 0.5;
    const double place = at > 0.0 ? at : 0.0;
    first = smaller(int64_t(place), extent - 1);
    second = smaller(first + 1, extent - 1);
    share = float(place - double(first));
  }
};

struct Scratch {
  char* end;
  int64_t pitch, plane;       // floats of a row and of a plane
  float *row, *rows, *pad, *flat, *side, *ring, *slot[2], *share;
  int32_t *first, *second;    // taps along the last axis
  const float** sources;

  Scratch(const AugmentView& v, char* base) : end(base) {
    const int64_t ring_planes = v.radius ? 2 * v.radius + 1 : 0;
    pitch = (v.size[2] + kPitch - 1) / kPitch * kPitch, plane = v.size[1] * pitch;
    row = take<float>(v.extent[2] + kPitch), rows = take<float>(v.extent[1] * pitch);
    pad = take<float>(pitch + 2 * v.radius + kWide * kPitch);
    flat = take<float>(plane), side = take<float>(plane), ring = take<float>(ring_planes * plane);
    slot[0] = take<float>(plane), slot[1] = take<float>(plane), share = take<float>(v.size[2]);
    first = take<int32_t>(v.size[2]), second = take<int32_t>(v.size[2]);
    sources = take<const float*>(2 * v.radius + 2);
  }

  template <class T>
  T* take(int64_t count) {
    T* const found = reinterpret_cast<T*>(end);
    end += (count * int64_t(sizeof(T)) + 63) / 64 * 64;
    return found;
  }
};

template <int V>
INLINE void weighted_block(const float* const* sources, const float* weights, int64_t count, int64_t at, float* to) {
  Vec<float> sum[V] = {};
  for (int64_t k = 0; k < count; ++k)
    for (int v = 0; v < V; ++v) sum[v] += weights[k] * load(sources[k] + at + v * kLanes<float>);
  for (int v = 0; v < V; ++v) store(to + at + v * kLanes<float>, sum[v]);
}

// to[i] = sum of weights[k] * sources[k][i]; n is whole vectors
void weighted(const float* const* sources, const float* weights, int64_t count, int64_t n, float* to) {
  int64_t i = 0;
  for (; i + kWide * kLanes<float> <= n; i += kWide * kLanes<float>)
    weighted_block<kWide>(sources, weights, count, i, to);
  for (; i < n; i += kLanes<float>) weighted_block<1>(sources, weights, count, i, to);
}

void between(const float* a, const float* b, float share, int64_t n, float* to) {
  const float* const sources[2] = {a, b};
  const float weights[2] = {1.0f - share, share};
  weighted(sources, weights, 2, n, to);
}

void window(const AugmentView& v, const int16_t* from, float* to) {
  const int64_t n = v.extent[2], step = v.step[2];
  if (step == 1)
    for (int64_t i = 0; i < n; ++i) to[i] = clamp01((float(from[i]) - v.low) * v.scale);
  else
    for (int64_t i = 0; i < n; ++i) to[i] = clamp01((float(from[i * step]) - v.low) * v.scale);
}

// Plane z of the box, windowed, in the size of the view's planes
void source_plane(const AugmentView& v, const Scratch& s, int64_t z, float* to) {
  const bool wide = v.extent[2] == v.size[2], high = v.extent[1] == v.size[1];
  float* const rows = high ? to : s.rows;
  for (int64_t y = 0; y < v.extent[1]; ++y) {
    const int16_t* const from = v.box + z * v.step[0] + y * v.step[1];
    float* const row = rows + y * s.pitch;
    if (wide) {
      window(v, from, row);
      continue;
    }
    window(v, from, s.row);
    for (int64_t x = 0; x < v.size[2]; ++x) {
      const float a = s.row[s.first[x]], b = s.row[s.second[x]];
      row[x] = a + (b - a) * s.share[x];
    }
  }
  for (int64_t y = 0; y < v.size[1] && !high; ++y) {
    const Tap tap(y, v.extent[1], v.size[1]);
    between(rows + tap.first * s.pitch, rows + tap.second * s.pitch, tap.share, s.pitch, to + y * s.pitch);
  }
}

// Planes of the view before the blur, asked for in ascending order
struct Planes {
  const AugmentView& v;
  Scratch& s;
  int64_t held[2] = {-1, -1};

  const float* source(int which, int64_t z) {
    if (held[which] != z) source_plane(v, s, z, s.slot[which]);
    held[which] = z;
    return s.slot[which];
  }

  const float* at(int64_t z) {
    const Tap tap(z, v.extent[0], v.size[0]);
    if (held[1] == tap.first && held[0] != tap.first) {
      float* const slot = s.slot[0];
      s.slot[0] = s.slot[1], s.slot[1] = slot, held[1] = held[0], held[0] = tap.first;
    }
    const float* const first = source(0, tap.first);
    if (tap.share == 0.0f || tap.second == tap.first) return first;
    between(first, source(1, tap.second), tap.share, s.plane, s.flat);
    return s.flat;
  }
};

// One plane blurred along its rows, then along its columns
void blur_plane(const AugmentView& v, const Scratch& s, const float* from, float* to) {
  const int64_t n = v.size[2], radius = v.radius, taps = 2 * radius + 1;
  for (int64_t y = 0; y < v.size[1]; ++y) {
    for (int64_t x = 0; x < n; ++x) s.pad[radius + x] = from[y * s.pitch + x];
    for (int64_t k = 1; k <= radius; ++k) {
      s.pad[radius - k] = from[y * s.pitch + mirrored(-k, n)];
      s.pad[radius + n - 1 + k] = from[y * s.pitch + mirrored(n - 1 + k, n)];
    }
    for (int64_t k = 0; k < taps; ++k) s.sources[k] = s.pad + k;
    weighted(s.sources, v.weights, taps, s.pitch, s.side + y * s.pitch);
  }
  for (int64_t y = 0; y < v.size[1]; ++y) {
    for (int64_t k = 0; k < taps; ++k) s.sources[k] = s.side + mirrored(y + k - radius, v.size[1]) * s.pitch;
    weighted(s.sources, v.weights, taps, s.pitch, to + y * s.pitch);
  }
}

// Gain and shift of a plane into the view, and its sum, in an order that no vector width changes
double emit(const AugmentView& v, const Scratch& s, const float* from, float* to) {
  double total = 0.0;
  for (int64_t y = 0; y < v.size[1]; ++y, from += s.pitch, to += v.size[2]) {
    float part[kPitch] = {};
    int64_t x = 0;
    for (; x + kPitch <= v.size[2]; x += kPitch)
      for (int i = 0; i < kPitch; ++i) part[i] += to[x + i] = clamp01(from[x + i] * v.gain + v.shift);
    for (; x < v.size[2]; ++x) part[0] += to[x] = clamp01(from[x] * v.gain + v.shift);
    for (int i = 0; i < kPitch; ++i) total += part[i];
  }
  return total;
}

int64_t scratch(const AugmentView& view) { return Scratch(view, nullptr).end - static_cast<char*>(nullptr); }

void place(const AugmentView& v, int64_t first, int64_t last, char* memory, double* sums) {
  Scratch s(v, memory);
  for (int64_t x = 0; x < v.size[2]; ++x) {
    const Tap tap(x, v.extent[2], v.size[2]);
    s.first[x] = int32_t(tap.first), s.second[x] = int32_t(tap.second), s.share[x] = tap.share;
  }
  Planes planes{v, s};
  const int64_t radius = v.radius, depth = v.size[0], held = 2 * radius + 1;
  int64_t made = greater(0, first - radius);  // the next plane that the ring gets
  for (int64_t z = first; z < last; ++z) {
    const float* plane = nullptr;
    if (radius == 0) {
      plane = planes.at(z);
    } else {
      for (; made <= smaller(depth - 1, z + radius); ++made)
        blur_plane(v, s, planes.at(made), s.ring + made % held * s.plane);
      for (int64_t k = 0; k < held; ++k) s.sources[k] = s.ring + mirrored(z + k - radius, depth) % held * s.plane;
      weighted(s.sources, v.weights, held, s.plane, s.side);
      plane = s.side;
    }
    sums[z] = emit(v, s, plane, v.out + z * v.plane());
  }
}

void finish_group(const AugmentView& v, float mean, const float* noise, float* x) {
  if (v.contrast != 1.0f)
    for (int i = 0; i < kRandomGroup; ++i) x[i] = clamp01((x[i] - mean) * v.contrast + mean);
  if (v.gamma != 1.0f) {  // loops of their own, or the compiler makes branches of what is done to 0
    float power[kRandomGroup];
    for (int i = 0; i < kRandomGroup; ++i) power[i] = v.gamma * log_positive(x[i] + 1e-37f);
    for (int i = 0; i < kRandomGroup; ++i) power[i] = exp_negative(power[i]);
    for (int i = 0; i < kRandomGroup; ++i) x[i] = x[i] > 0.0f ? power[i] : 0.0f;
  }
  if (noise != nullptr)
    for (int i = 0; i < kRandomGroup; ++i) x[i] = clamp01(x[i] + v.noise * noise[i]);
}

void finish(const AugmentView& v, float mean, int64_t first, int64_t last) {
  float x[kRandomGroup] = {}, noise[kRandomGroup];
  uint32_t word[kRandomGroup];
  for (int64_t group = first / kRandomGroup * kRandomGroup; group < last; group += kRandomGroup) {
    const int64_t low = greater(group, first), high = smaller(group + kRandomGroup, last);
    for (int64_t i = low; i < high; ++i) x[i - group] = v.out[i];
    if (v.noise != 0.0f) {
      MEDFAST_ISA::random_kernel.words(v.philox, v.sample, uint32_t(group / 4), word);
      MEDFAST_ISA::random_kernel.normal(word, noise);
    }
    finish_group(v, mean, v.noise != 0.0f ? noise : nullptr, x);
    for (int64_t i = low; i < high; ++i) v.out[i] = x[i - group];
  }
}

}  // namespace

namespace MEDFAST_ISA {
extern constexpr AugmentKernel augment_kernel{scratch, place, finish};
}  // namespace MEDFAST_ISA
