"""Which backend runs an operator: the only code that asks about devices, the environment and what is built.

reference  plain PyTorch, every operator, every device
cpp        csrc/, CPU tensors; the default there for the operators it has
triton     _triton/, NVIDIA GPUs, or CPU tensors in Triton's interpreter (TRITON_INTERPRET=1), where asked for
cuda       csrc/cuda/, NVIDIA GPUs
A backend that is asked for by name (``backend``, MEDFAST_BACKEND) and cannot run, or has no kernel, is an error. On
GPUs triton and cuda become the default by evidence alone (``_evidence``): a verdict for that device or its family.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any, ParamSpec, TypeVar

import torch

from ._checks import NAMESPACE, TRACED, one_of
from ._evidence import device_name, evidence

BACKENDS = ("reference", "cpp", "triton", "cuda")
KERNELS = {  # operator: who has a kernel of it, beside the reference
    "window_attention": ("cpp", "triton", "cuda"),
    "class_attention": ("cpp", "triton"),
    "token_contrast": ("cpp", "triton"),
    "attention_mask": ("cpp", "triton", "cuda"),
    "philox_words": ("cpp", "triton"),
    "random_ids": ("cpp", "triton"),
    "random_keep": ("cpp", "triton"),
    "random_uniform": ("cpp", "triton"),
    "random_normal": ("cpp", "triton"),
    "drop_tokens": ("cpp", "triton"),
    "restore_tokens": ("cpp", "triton"),
    "augment": ("cpp", "triton"),
}
OPERATORS = tuple(KERNELS)
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
_LIBRARY = Path(__file__).with_name("_csrc.so")
_OLDEST_TORCH = (2, 11)  # of the C++ library
_OLDEST_TRITON = (3, 5)


def _load() -> str | None:
    """Load the C++ operators; what stands in the way, or None."""
    name = _LIBRARY.name
    if not _LIBRARY.is_file():
        return f"{name} is not built: `pip install .` again where there are torch and a C++ compiler"
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < _OLDEST_TORCH:
        return f"{name} needs torch {'.'.join(map(str, _OLDEST_TORCH))} or later, this is {torch.__version__}"
    if b"MEDFAST_NAMESPACE=%s\0" % NAMESPACE.encode() not in _LIBRARY.read_bytes():  # one twice ends the process
        return f"{name} does not load: it is cut short, or of another package than {NAMESPACE}: build it again"
    try:
        torch.ops.load_library(str(_LIBRARY))
    except OSError as error:
        return f"{name} does not load: {error}"
    registered = getattr(torch.ops, NAMESPACE)
    if not all(hasattr(registered, operator) for operator, who in KERNELS.items() if "cpp" in who):
        return f"{name} was built of other sources: build it again"
    return None


class Refused(RuntimeError):
    """A backend was asked for by name and cannot run."""


WHY_NO_CPP = _load()
_asked: str | None = None
_said: set[str] = set()


def why_not(operator: str, name: str, device: torch.device) -> str | None:
    """Why backend ``name`` cannot run ``operator`` on ``device``; None if it can."""
    if name == "reference":
        return None
    if name not in KERNELS[operator]:
        return f"it has no {name} kernel"
    return {"cpp": _why_no_cpp, "triton": _why_no_triton, "cuda": _why_no_cuda}[name](device)


def _why_no_cpp(device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"the C++ kernels run on CPU, the tensors are on {device.type}"
    return WHY_NO_CPP


def _why_no_triton(device: torch.device) -> str | None:
    if not TRACED:
        return f"the Triton kernels need torch 2.4 or later, this is {torch.__version__}"
    if not _there("triton"):
        return "triton is not installed: pip install triton"
    if device.type == ("cpu" if interpreted() else "cuda"):
        return _why_triton_is_too_old()
    runs = "on CPU under TRITON_INTERPRET=1" if interpreted() else "on NVIDIA GPUs (on CPU: TRITON_INTERPRET=1)"
    return f"the Triton kernels run {runs}, the tensors are on {device.type}"


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _there(module: str) -> bool:
    return find_spec(module) is not None


@cache
def _why_triton_is_too_old() -> str | None:
    """Older ones have neither ``triton.knobs`` nor loops that keep what they could hoist."""
    version = import_module("triton").__version__
    if tuple(int(part) for part in version.split(".")[:2]) >= _OLDEST_TRITON:
        return None
    return f"the Triton kernels need Triton {'.'.join(map(str, _OLDEST_TRITON))} or later, this is {version}"


def built_with_cuda() -> bool:
    """Whether the C++ library is there and has the CUDA kernels."""
    return WHY_NO_CPP is None and getattr(torch.ops, NAMESPACE).built_with_cuda()


def _why_no_cuda(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"the CUDA kernels run on NVIDIA GPUs, the tensors are on {device.type}"
    if WHY_NO_CPP is not None or built_with_cuda():
        return WHY_NO_CPP
    return f"{_LIBRARY.name} was built without CUDA: build it again where nvcc is, with MEDFAST_CUDA=1"


def _constant(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """A compiled graph takes what this gives while it is traced, and does not look inside."""
    return torch.compiler.assume_constant_result(function) if TRACED else function


@_constant
def _refusal(operator: str, name: str, device: str) -> str | None:
    return why_not(operator, name, torch.device(device))


@_constant
def _proven(operator: str, device: str, no_cpp: str | None) -> tuple[str, ...]:
    return _found(operator, device, no_cpp)


@cache
def _found(operator: str, device: str, no_cpp: str | None) -> tuple[str, ...]:
    """``proven``, kept: it is asked at every call. no_cpp: WHY_NO_CPP, which the answer depends on."""
    return proven(operator, torch.device(device))


def forget() -> None:
    """Look at the evidence again."""
    evidence.cache_clear()
    _found.cache_clear()


@_constant
def _say_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        warnings.warn(message, stacklevel=5)  # at the call of the public operator


def proven(operator: str, device: torch.device) -> tuple[str, ...]:
    """The backends that may run ``operator`` on ``device`` with nobody asking for them, the fastest first.

    Evidence decides; without any, cpp on CPUs (benchmarks/results) and nothing on GPUs, which is said once.
    """
    if device.type not in ("cpu", "cuda"):
        return ()
    able = [name for name in KERNELS[operator] if why_not(operator, name, device) is None]
    for found in evidence(device) if able else ():
        if operator in found.verdict:
            return tuple(name for name in found.proven(operator) if name in able)
    if able and device.type == "cuda":
        _say_once(f"{device_name(device)}: {no_evidence(device)}")
    return tuple(name for name in able if (name, device.type) == ("cpp", "cpu"))


def no_evidence(device: torch.device) -> str:
    return (
        f"no kernel has been shown right and fast on it, so the reference runs; `python -m {__package__} qualify` "
        "checks and times them on this machine and keeps the verdict"
    )


def choose(operator: str, device: torch.device, unfit: Mapping[str, str] = MappingProxyType({})) -> str:
    """The backend that runs ``operator`` on ``device``: the one asked for, else the fastest that is proven there.

    unfit: {backend: why it has no kernel for this very call}. A backend that is asked for and unfit is an error; one
    that nobody asked for is passed over, and a warning says so once per reason.
    """
    asked = _asked or os.environ.get("MEDFAST_BACKEND")
    if asked:
        return _asked_for(operator, device, asked, unfit)
    for name in _proven(operator, str(device), WHY_NO_CPP):
        if name not in unfit:
            return name
        _say_once(f"{operator} does not run on {name} here: {unfit[name]}")
    return "reference"


def _asked_for(operator: str, device: torch.device, asked: str, unfit: Mapping[str, str]) -> str:
    one_of("MEDFAST_BACKEND" if _asked is None else "backend", asked, BACKENDS)
    reason = _refusal(operator, asked, str(device)) or unfit.get(asked)
    if reason is not None:
        raise Refused(
            f"{operator} was asked to run on backend {asked!r} and cannot: {reason}; "
            "with no backend asked for, each operator runs on the fastest it has"
        )
    return asked


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run the operators on backend ``name``, one of BACKENDS, in the whole process.

    Raises ValueError for other names, and RuntimeError with the reason where the backend is not there, or, when an
    operator is called, where it has no kernel there or cannot run on those tensors.
    """
    global _asked
    one_of("backend", name, BACKENDS)
    if name == "cpp" and WHY_NO_CPP is not None:
        raise Refused(f"backend 'cpp' is not there: {WHY_NO_CPP}")
    before, _asked = _asked, name
    try:
        yield
    finally:
        _asked = before


def devices() -> list[torch.device]:
    """One of each kind that is here."""
    return [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]


def build_facts() -> dict[str, Any]:
    """How the C++ library was built; empty where the module that tells it is not there: it takes pybind11."""
    try:
        module = import_module("._facts", __package__)
    except ImportError:
        return {}
    told = module.facts()
    return told if told["namespace"] == NAMESPACE else {}


def window_plan(grid: list[int], window: list[int], shift: list[int], heads: int) -> str | None:
    """How window attention on CPU would go about one sample, in a line; None without the module that tells it."""
    if not build_facts():
        return None
    plan = import_module("._facts", __package__).window_plan(grid, window, shift, heads=heads, clip=True)
    clipped = [axis for axis, clips in enumerate(plan["clips"]) if clips]
    return (
        f"grid {grid}, window {window}, shift {shift}, {heads} heads: {plan['windows']} windows of {plan['tokens']} "
        f"tokens, {sum(plan['masked'])} of them masked, {plan['pads']} pads, axes clipped: {clipped or 'none'}, "
        f"{plan['launch'][0]} chunks x {plan['launch'][1]} heads for {torch.get_num_threads()} threads"
    )


def facts() -> dict[str, str]:
    """What is built and where it runs."""
    facts = {"torch": torch.__version__, "operators": f"torch.ops.{NAMESPACE}"}
    if WHY_NO_CPP is None:
        facts["C++ library"] = str(_LIBRARY)
        facts["instruction set"] = getattr(torch.ops, NAMESPACE).instruction_set()
        facts["threads"] = str(torch.get_num_threads())
        for name, told in build_facts().items():
            facts[name] = ", ".join(told) or "none" if isinstance(told, list) else told
        if (planned := window_plan([32] * 3, [4] * 3, [2] * 3, 4)) is not None:  # SMART's first stage at 64^3
            facts["plan of windows"] = planned
    return facts
