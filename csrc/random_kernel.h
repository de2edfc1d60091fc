// What random_kernel.cpp makes for an instruction set.
#pragma once

#include <cstdint>

#include "isa.h"
#include "philox_group.h"

struct RandomKernel {
  void (*words)(const Philox& philox, int64_t sample, uint32_t first_block, uint32_t* out);  // kRandomGroup of each
  void (*normal)(const uint32_t* words, float* out);
};

MEDFAST_KERNEL(RandomKernel, random_kernel);
