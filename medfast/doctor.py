"""``medfast doctor``: what is installed, what each missing piece would add, which backend each operator would use.

Looks, and imports as little as possible: a broken package must be reported here, not crash here.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import medfast

__all__ = ["doctor"]

FREE_GB = 20  # a store of a few thousand volumes and some checkpoints
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "1073741824", "MALLOC_TRIM_THRESHOLD_": "1073741824"}


@dataclass(frozen=True)
class Part:
    """A dependency. distributions: names it is published under; adds: what one can do with it; pip: how to get it."""

    module: str
    distributions: tuple[str, ...]
    adds: str
    pip: str

    @property
    def version(self) -> str | None:
        """Installed version, "?" where it does not say, None where it is not installed."""
        try:
            if importlib.util.find_spec(self.module) is None:
                return None
        except (ImportError, ValueError):  # a parent package is missing, or is not what it claims to be
            return None
        for name in self.distributions:
            try:
                return importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
        return "?"


TRAIN, DEV = 'pip install "medfast[train]"', 'pip install "medfast[dev]"'
PARTS = (
    Part("torch", ("torch",), "everything", "pip install torch"),
    Part("numpy", ("numpy",), "everything", "pip install numpy"),
    Part("yaml", ("PyYAML",), "reading configs/*.yaml: pretrain, report", TRAIN),
    Part("nibabel", ("nibabel",), "data prepare: reading NIfTI", TRAIN),
    Part("safetensors", ("safetensors",), "checkpoints: pretrain, report", TRAIN),
    Part("deepspeed", ("deepspeed",), "train.strategy: deepspeed (ZeRO stages, launch); ddp works without", TRAIN),
    Part("rich", ("rich",), "progress of data prepare and pretrain", TRAIN),
    Part("tensorboard", ("tensorboard",), "curves in run/tb beside metrics.jsonl", TRAIN),
    Part("matplotlib", ("matplotlib",), "medfast report", TRAIN),
    Part("nvidia.dali", ("nvidia-dali-cuda130", "nvidia-dali-cuda120"),
         "data.executor: dali, views made by DALI; torch makes the same views",
         'pip install "medfast[dali-cu13]" (CUDA 12 drivers: dali-cu12)'),
    Part("blosc2", ("blosc2",), "stores of the layout blosc2, half the disk", 'pip install "medfast[blosc2]"'),
    Part("isal", ("isal",), "data prepare inflates .nii.gz about twice as fast", "pip install isal"),
    Part("triton", ("triton",), "the Triton kernels, and torch.compile, on NVIDIA GPUs", "pip install triton"),
    Part("ninja", ("ninja",), "building csrc in parallel", DEV),
    Part("pybind11", ("pybind11",), "at a build: facts of it, which this report shows", DEV),
    Part("monai", ("monai",), "comparison with MONAI's Swin in the tests", DEV),
    Part("pytest", ("pytest",), "make test", DEV),
    Part("hypothesis", ("hypothesis",), "make test", DEV),
)  # fmt: skip


def doctor() -> str:
    """The whole report, plain text."""
    sections = (
        ("Machine", _machine), ("Packages", _packages), ("Kernels", _kernels), ("Advice", _advice),
    )  # fmt: skip
    return "\n\n".join(f"{title}\n{_indented(_safely(look))}" for title, look in sections)


def _safely(look) -> Iterable[str]:
    try:
        return list(look())
    except Exception as error:  # noqa: BLE001 - a doctor that dies of what it finds helps nobody
        return [f"could not be looked at: {type(error).__name__}: {error}"]


def _indented(lines: Iterable[str]) -> str:
    return "\n".join(f"  {line}" for line in lines)


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _machine() -> Iterable[str]:
    free = shutil.disk_usage(Path.cwd()).free / 1e9
    rows = [
        ("medfast", medfast.__version__),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("cores", _cores()),
        *((f"device {i}" if i else "device", text) for i, text in enumerate(_devices())),
        ("memory", f"{_memory_gb():.1f} GB" if _memory_gb() else "unknown"),
        (
            "disk here",
            f"{free:.0f} GB free"
            + (f", little for a store and checkpoints (want {FREE_GB})" if free < FREE_GB else ""),
        ),
    ]
    return _columns(rows)


def _cores() -> str:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = os.environ.get("OMP_NUM_THREADS")
    return f"{usable} usable" + (f", OMP_NUM_THREADS={threads}" if threads else "")


def _memory_gb() -> float:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    except (AttributeError, ValueError, OSError):
        return 0.0


def _devices() -> list[str]:
    if importlib.util.find_spec("torch") is None:
        return ["unknown: torch is not installed"]
    torch = importlib.import_module("torch")
    if not torch.cuda.is_available():
        why = (
            "this torch is built without CUDA" if torch.version.cuda is None else "torch finds no usable GPU or driver"
        )
        return [f"cpu ({why})"]
    found = []
    for i in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(i)
        found.append(
            f"{about.name}, sm_{about.major}{about.minor}, {about.total_memory / 2**30:.0f} GB, "
            f"CUDA {torch.version.cuda}"
        )
    return found


def _packages() -> Iterable[str]:
    have, lack = [], []
    for part in PARTS:
        version = part.version
        if version is None:
            lack.append(("missing", part.module, f"would add: {part.adds}", part.pip))
        else:
            have.append(("ok", part.module, version, part.adds))
    return [*(_columns(have) if have else []), *(_columns(lack) if lack else [])]


def _kernels() -> Iterable[str]:
    """The backend of each operator on each kind of device here, asked of the one place that decides it."""
    torch = importlib.import_module("torch")
    dispatch = importlib.import_module("medfast_kernels._dispatch")
    why = dispatch.WHY_NO_CPP
    yield f"C++ kernels: {'built and loaded' if why is None else f'not there: {why}'}"
    for name, value in dispatch.facts().items():
        if name not in ("torch", "C++ library"):
            yield f"{name}: {value}"
    if asked := os.environ.get("MEDFAST_BACKEND"):
        yield f"MEDFAST_BACKEND={asked} overrules the choice below"
    rows = []
    for device in (torch.device(kind) for kind in ("cpu", "cuda") if kind == "cpu" or torch.cuda.is_available()):
        for operator in dispatch.OPERATORS:
            rows.append((operator, f"on {device.type}", *_choice(dispatch, operator, device)))
    yield from _columns(rows)


def _choice(dispatch, operator: str, device) -> tuple[str, str]:
    """(backend, why): the one that ``operator`` would use and what keeps the others from it."""
    try:
        chosen = dispatch.choose(operator, device)
    except (RuntimeError, ValueError) as error:
        return "none", str(error)
    others = {name: dispatch.why_not(operator, name, device) for name in dispatch.BACKENDS if name != chosen}
    return chosen, "; ".join(f"{name}: {reason or 'runs if asked for'}" for name, reason in others.items())


def _advice() -> Iterable[str]:
    advice = []
    missing = [part for part in PARTS if part.pip == TRAIN and part.version is None]
    if missing:
        advice.append(f"to pretrain, install what is missing above: {TRAIN}")
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        unset = [f"{name}={value}" for name, value in MALLOC.items() if name not in os.environ]
        if unset:
            advice.append(f"CPU runs: export {' '.join(unset)}; otherwise glibc hands large buffers back after each "
                          "operator and a step takes up to twice as long")  # fmt: skip
    return advice or ["nothing: all is well"]
