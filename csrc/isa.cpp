// The choice of instruction set. Operators register themselves, each in its own file, under a namespace that is the
// package's name, so that copies vendored under other names load side by side.
#include "isa.h"

#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

#include <torch/csrc/stable/library.h>

namespace {

using Choice = std::pair<std::string, Isa>;

Choice choose() {
  std::vector<Choice> there{{"plain", Isa::plain}};  // best last
#ifdef MEDFAST_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq");
  if (avx2) there.push_back({"avx2", Isa::avx2});
  if (avx512) there.push_back({"avx512", Isa::avx512});
#endif
  const char* asked = std::getenv("MEDFAST_ISA");  // for tests: an older instruction set than the processor's best
  if (!asked || !*asked) return there.back();
  std::string names;
  for (const Choice& one : there) {
    if (asked == one.first) return one;
    names += (names.empty() ? "" : ", ") + one.first;
  }
  STD_TORCH_CHECK(false, "MEDFAST_ISA must be one of those that this processor runs: ", names, "; got ", asked);
}

const Choice& chosen() {
  static const Choice choice = choose();
  return choice;
}

std::string instruction_set() { return chosen().first; }

bool built_with_cuda() {
#ifdef MEDFAST_CUDA
  return true;
#else
  return false;
#endif
}

}  // namespace

// Read in the file by _dispatch.py before it loads it: operators that are registered twice end the process.
#define MEDFAST_TEXT(name) MEDFAST_TEXT_OF(name)
#define MEDFAST_TEXT_OF(name) #name
extern "C" __attribute__((used, visibility("default"))) const char medfast_namespace[] =
    "MEDFAST_NAMESPACE=" MEDFAST_TEXT(MEDFAST_NAMESPACE);

Isa isa() { return chosen().second; }

STABLE_TORCH_LIBRARY_FRAGMENT(MEDFAST_NAMESPACE, m) {
  m.def("instruction_set() -> str");
  m.def("built_with_cuda() -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(MEDFAST_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&instruction_set));
  m.impl("built_with_cuda", TORCH_BOX(&built_with_cuda));
}
