"""Compile the Triton kernels that a call launches, ahead of time and without a GPU, and read what the cubins cost.

    case = Case(lambda: attend(...), {"forward": 4096})     # kernel name: units of work per turn of its innermost loop
    for kernel in compiled(case.call, arch=90): print(kernel.name, cost(kernel))

The call runs as it would on a GPU, on CPU tensors whose values do not matter: launches compile and stop there, so the
variants, alignments and launch configurations are the true ones. Not under TRITON_INTERPRET.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

ARCHS = (80, 90)
TENSOR_CORE = re.compile(r"\b(HMMA|HGMMA|IMMA)\.")
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", re.M)
_JUMP = re.compile(r"\bBRA(?:\.\w+)*\s+(?:!?U?P\w+,\s*)?`?\(?(?:\.L_x_\d+|0x([0-9a-f]+))")


class Case(NamedTuple):
    """call: what launches the kernels. work: {kernel name: units of work (scores, rows, ...) of one turn of the loop
    that does it, or of one program if it has none}; kernels that are not named are compiled but not held to a budget.
    """

    call: Callable[[], Any]
    work: dict[str, int]


class Kernel(NamedTuple):
    name: str
    cubin: bytes
    warps: int
    shared: int


class Cost(NamedTuple):
    """Per thread: registers, spilled bytes. instructions: of the whole kernel; loop: of its working loop, or None.

    cold: those of the loop that a branch inside it jumps over: the mask, say, that few windows need.
    """

    registers: int
    spills: int
    shared: int
    instructions: int
    loop: int | None
    tensor_core: bool
    cold: int


class _NoDevice:
    """What the launcher asks of a driver."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return -self.arch  # the launcher caches what it compiled by device

    def get_current_stream(self, device: int) -> int:
        return 0


def compiled(call: Callable[[], Any], arch: int) -> list[Kernel]:
    """The kernels that ``call`` launches, compiled for sm_<arch>, in order, each variant once."""
    found: dict[str, Kernel] = {}
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        built = run(self, *args, grid=grid, warmup=True, **options)
        metadata = built.metadata
        found[built.hash] = Kernel(metadata.name, built.asm["cubin"], metadata.num_warps, metadata.shared)

    driver.set_active(_NoDevice(arch))
    try:
        with patch.object(JITFunction, "run", compile_only):
            call()
    finally:
        driver._active = None
    return list(found.values())


def cost(kernel: Kernel) -> Cost:
    """What the compiler made of it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(kernel.cubin)
        usage, code = _dump("-res-usage", path), _dump("-sass", path)
    line = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    assert line, usage
    registers, stack, _, local = map(int, line.groups())
    listing = [(int(at, 16), text) for at, text in _INSTRUCTION.findall(code)]
    listing = [(at, text) for at, text in listing if not re.search(r"\bNOP\b", text)]
    assert listing, "no SASS was read"
    spills = max(stack + local, sum("STL" in text or "LDL" in text for _, text in listing))
    loop = _working_loop(listing)
    return Cost(
        registers, spills, kernel.shared, len(listing), None if loop is None else len(loop),
        any(TENSOR_CORE.search(text) for _, text in listing), _jumped_over(loop or []),
    )  # fmt: skip


def per_unit(kernel: Kernel, measured: Cost, units: int) -> float:
    """Thread instructions per unit of work: of the working loop where there is one, else of the kernel."""
    return (measured.loop or measured.instructions) * kernel.warps * 32 / units


def _jumps(listing: list[tuple[int, str]]) -> list[tuple[int, int]]:
    """(from, to) of every branch."""
    found = [(at, _JUMP.search(text)) for at, text in listing]
    return [(at, int(jump.group(1), 16)) for at, jump in found if jump and jump.group(1)]


def _working_loop(listing: list[tuple[int, str]]) -> list[tuple[int, str]] | None:
    """The longest loop."""
    loops = [[line for line in listing if to <= line[0] <= at] for at, to in _jumps(listing) if to < at]
    return max(loops, key=len, default=None)


def _jumped_over(loop: list[tuple[int, str]]) -> int:
    ends = [(at, to) for at, to in _jumps(loop) if at < to <= loop[-1][0]]
    return sum(any(at < where < to for at, to in ends) for where, _ in loop)


def _dump(option: str, path: Path) -> str:
    tool = knobs.nvidia.cuobjdump.path
    return subprocess.run([tool, option, str(path)], capture_output=True, text=True, check=True).stdout
