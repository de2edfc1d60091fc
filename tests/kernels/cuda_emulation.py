"""The CUDA kernels and operators of csrc/cuda on a CPU: the same sources, compiled by the C++ compiler against emulated
lanes, barriers and matrix instructions (csrc/cuda/emulated.h), under a namespace of their own."""

import sys
from pathlib import Path

import torch

from medfast_kernels._cuda import masking, window

ROOT = Path(__file__).parents[2]
NAMESPACE = "medfast_emulated"
sys.path.insert(0, str(ROOT / "csrc"))


def why_not():
    """Why the emulation cannot be built, None if it can."""
    import build_csrc

    if build_csrc.find_compiler() is None or build_csrc.find_torch() is None:
        return "it needs a C++ compiler and torch"
    return None


def build(folder):
    """The library, compiled in ``folder`` where it changed."""
    import build_csrc
    import build_cuda

    torch_folder = build_csrc.find_torch()
    flags = ["-std=c++20", "-O1", "-fno-strict-aliasing", "-Wno-unknown-pragmas", f"-isystem{torch_folder / 'include'}"]
    few_blocks = "-DMEDFAST_BLOCKS=8"  # so that each takes several windows
    defines = ["-DMEDFAST_EMULATED", f"-DMEDFAST_NAMESPACE={NAMESPACE}", few_blocks]
    compiler, calls = [build_csrc.find_compiler(), *build_csrc.COMMON, *flags, *defines], []
    headers = [*build_cuda.CUDA.glob("*.h"), build_csrc.HERE / "philox.h"]
    for source in sorted([*build_cuda.CUDA.glob("*.cu"), *build_cuda.CUDA.glob("*.cpp")]):
        made = folder / f"{source.stem}.o"
        calls.append(([*compiler, "-x", "c++", "-c", str(source), "-o", str(made)], made, [source, *headers]))
    objects, library = [made for _, made, _ in calls], folder / "linked.so"
    link = [compiler[0], "-shared", *map(str, objects), "-o", str(library), f"-L{torch_folder / 'lib'}", "-ltorch_cpu"]
    build_csrc.make(folder, [*calls, (link, library, objects)], folder / "emulated.so")
    return folder / "emulated.so"


def load():
    """torch.ops.medfast_emulated; once in a process."""
    operators = getattr(torch.ops, NAMESPACE)
    if not hasattr(operators, "window_attention_cuda"):
        torch.ops.load_library(str(build(ROOT / "build" / "emulated")))
        window.register(NAMESPACE)
        masking.register(NAMESPACE)
    return operators
