// Schemas. The namespace is the package's name, so that copies vendored under other names load side by side.
#include "operators.h"

#include <cstdlib>

#define WINDOW_ARGUMENTS                                                                                        \
  "Tensor qkv, Tensor? bias, Tensor scale, Tensor? pad_value, Tensor? keep, Tensor? draw, int[] window, "       \
  "int[] shift, bool cosine, bool live_pads, float dropout, int seed"

const InstructionSet& instruction_set() {
  static const InstructionSet chosen = [] {
    std::vector<InstructionSet> there{{"plain", &plain::window_float, &plain::window_double}};  // best last
#ifdef MEDFAST_X86
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq");
    if (avx2) there.push_back({"avx2", &avx2::window_float, &avx2::window_double});
    if (avx512) there.push_back({"avx512", &avx512::window_float, &avx512::window_double});
#endif
    const char* asked = std::getenv("MEDFAST_ISA");  // for tests: an older instruction set than the processor's best
    if (!asked || !*asked) return there.back();
    std::string names;
    for (const InstructionSet& one : there) {
      if (std::string(asked) == one.name) return one;
      names += (names.empty() ? "" : ", ") + std::string(one.name);
    }
    STD_TORCH_CHECK(false, "MEDFAST_ISA must be one of those that this processor runs: ", names, "; got ", asked);
  }();
  return chosen;
}

std::string instruction_set_name() { return instruction_set().name; }

STABLE_TORCH_LIBRARY(MEDFAST_NAMESPACE, m) {
  m.def("window_attention(" WINDOW_ARGUMENTS ") -> (Tensor, Tensor)");
  m.def("window_attention_backward(Tensor grad, Tensor out, Tensor lse, " WINDOW_ARGUMENTS
        ") -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("philox_words(Tensor address, int count, int seed) -> Tensor");
  m.def("instruction_set() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(MEDFAST_NAMESPACE, CPU, m) {
  m.impl("window_attention", TORCH_BOX(&window_attention));
  m.impl("window_attention_backward", TORCH_BOX(&window_attention_backward));
  m.impl("philox_words", TORCH_BOX(&philox_words));
}

STABLE_TORCH_LIBRARY_IMPL(MEDFAST_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&instruction_set_name));
}
