// What augment_kernel.cpp makes for an instruction set: a view of an int16 box, planes of it at a time.
#pragma once

#include <cstdint>

#include "isa.h"
#include "philox.h"

struct AugmentView {
  const int16_t* box;         // its voxel (0, 0, 0), after turning
  int64_t step[3];            // from voxel to voxel along each axis, in elements; negative where it is mirrored
  int64_t extent[3], size[3]; // of the turned box, of the view
  float low, scale;           // value = (HU - low) * scale
  float gain, shift, contrast, gamma, noise;
  const float* weights;       // of the blur, 2 * radius + 1
  int64_t radius;             // 0: no blur
  Philox philox;              // of the noise
  int64_t sample;
  float* out;

  int64_t plane() const { return size[1] * size[2]; }
};

struct AugmentKernel {
  int64_t (*scratch)(const AugmentView& view);  // bytes that `place` needs
  // Planes [first, last): window, resize, blur, gain and shift; sums[z] becomes the sum of plane z
  void (*place)(const AugmentView& view, int64_t first, int64_t last, char* scratch, double* sums);
  // Voxels [first, last): contrast about `mean`, gamma, noise
  void (*finish)(const AugmentView& view, float mean, int64_t first, int64_t last);
};

MEDFAST_KERNEL(AugmentKernel, augment_kernel);
