"""Build the CUDA kernels of csrc/cuda into the library: kernels (.cu) by nvcc, operators (.cpp) by the C++ compiler.

They are part of a build where there are nvcc and a GPU, or where MEDFAST_CUDA=1 asks for them: they run nowhere else,
and take half a minute. The result carries the CUDA runtime in it, so it loads where there is no CUDA, in a CPU-only
torch too: build it here, carry it to a GPU. What ptxas says of registers and spills stands beside the objects, in
``<name>.ptxas.txt``.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import build_csrc

CUDA = build_csrc.HERE / "cuda"
OLDEST_NVCC = (12, 0)  # the first that knows C++20
ARCHITECTURES = [  # machine code for A100 and H100, and what later GPUs translate for themselves
    "-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90a,code=sm_90a",
    "-gencode=arch=compute_90,code=compute_90",
]  # fmt: skip
FLAGS = ["-std=c++20", "-O3", "-Xptxas=-v", "-Xcompiler=-fPIC,-fvisibility=hidden"]


def find_nvcc() -> str | None:
    """On PATH, else under CUDA_HOME."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc") or (shutil.which("nvcc", path=str(Path(home) / "bin")) if home else None)


def nvcc_version(nvcc: str) -> tuple[int, ...]:
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release (\d+)\.(\d+)", said)
    if found is None:
        raise RuntimeError(f"{nvcc} --version names no release: {said.strip()}")
    return tuple(int(part) for part in found.groups())


def gpu_is_here() -> bool:
    return Path("/proc/driver/nvidia/version").is_file()


def why_no_cuda() -> str | None:
    """Why the CUDA kernels are left out of this build, None if they are built; an error with MEDFAST_CUDA=1."""
    asked = os.environ.get("MEDFAST_CUDA", "")
    if asked not in ("", "0", "1"):
        raise ValueError(f"MEDFAST_CUDA must be 0 (no CUDA kernels) or 1 (build them or fail), got {asked!r}")
    if asked == "0":
        return "MEDFAST_CUDA=0"
    nvcc, reason = find_nvcc(), None
    if nvcc is None:
        reason = "no nvcc on PATH or in CUDA_HOME"
    elif nvcc_version(nvcc) < OLDEST_NVCC:
        reason = f"nvcc {nvcc_version(nvcc)} is older than {OLDEST_NVCC}"
    if asked == "1":
        if reason:
            raise RuntimeError(f"MEDFAST_CUDA=1 asks for the CUDA kernels, but {reason}")
        return None
    return reason or (None if gpu_is_here() else "no NVIDIA GPU is here; MEDFAST_CUDA=1 builds them all the same")


def steps(folder: Path, operators: list[str]) -> list[build_csrc.Call]:
    """Compiler calls that make the objects. operators: command of the C++ compiler that ``-c FILE -o OBJECT`` ends."""
    nvcc, calls = find_nvcc(), []
    assert nvcc is not None
    headers = [*sorted(CUDA.glob("*.h")), build_csrc.HERE / "philox.h"]
    for source in sorted(CUDA.glob("*.cu")):
        made = folder / f"cuda_{source.stem}.o"
        command = [nvcc, f"-ccbin={operators[0]}", *FLAGS, *ARCHITECTURES, "-c", str(source), "-o", str(made)]
        said = shlex.quote(str(made.with_suffix(".ptxas.txt")))
        kept = f"{shlex.join(command)} > {said} 2>&1 || {{ cat {said} >&2; rm -f {said}; exit 1; }}"
        calls.append((["sh", "-c", kept], made, [source, *headers]))
    for source in sorted(CUDA.glob("*.cpp")):
        made = folder / f"cuda_{source.stem}.o"
        calls.append(([*operators, "-c", str(source), "-o", str(made)], made, [source, *headers]))
    return calls


def runtime() -> list[str]:
    """Linker flags of the CUDA runtime, as a part of the library that shows none of its names."""
    nvcc = find_nvcc()
    assert nvcc is not None
    said = subprocess.run([nvcc, "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True, check=False)
    top = re.search(r"^#\$ TOP=(.+)$", said.stdout + said.stderr, re.M)
    root = Path(top.group(1).strip() if top else Path(nvcc).resolve().parents[1])
    places = [root / "lib64", root / "lib", *sorted(root.glob("targets/*/lib"))]
    found = next((place / "libcudart_static.a" for place in places if (place / "libcudart_static.a").is_file()), None)
    if found is None:
        raise RuntimeError(
            f"libcudart_static.a is in none of {', '.join(map(str, places))}: install the CUDA runtime's files"
        )
    return [str(found), "-Wl,--exclude-libs,ALL", "-ldl", "-lrt", "-lpthread"]
