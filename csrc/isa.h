// Which instruction set the CPU kernels run on. Every *_kernel.cpp is compiled once for each, into a namespace of its
// name, with MEDFAST_ISA = plain, avx2 or avx512; the operator picks one when it is called.
#pragma once

enum class Isa { plain, avx2, avx512 };

Isa isa();  // the best one that this build has and this processor runs, or what MEDFAST_ISA in the environment names

// Declares a kernel table that each instruction set defines: MEDFAST_KERNEL(WindowKernel<float>, window_float);
#define MEDFAST_KERNEL(type, name)                \
  namespace plain { extern const type name; }     \
  namespace avx2 { extern const type name; }      \
  namespace avx512 { extern const type name; }    \
  static_assert(true, "")

#ifdef MEDFAST_X86
#define MEDFAST_PICK(name) (isa() == Isa::avx512 ? avx512::name : isa() == Isa::avx2 ? avx2::name : plain::name)
#else
#define MEDFAST_PICK(name) (plain::name)
#endif
