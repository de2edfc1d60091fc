"""Which backend runs an operator: the only code that asks about devices, the environment and what is built.

reference  plain PyTorch, every operator, every device
cpp        csrc/, CPU tensors; the default there for the operators it has
triton     _triton/, NVIDIA GPUs, or CPU tensors in Triton's interpreter (TRITON_INTERPRET=1), where asked for
cuda       csrc/cuda/, NVIDIA GPUs, where asked for
A backend that is asked for by name (``backend``, MEDFAST_BACKEND) and cannot run, or has no kernel, is an error.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import ParamSpec, TypeVar

import torch

from ._checks import NAMESPACE, one_of

BACKENDS = ("reference", "cpp", "triton", "cuda")
KERNELS = {  # operator: who has a kernel of it, beside the reference
    "window_attention": ("cpp",),
    "class_attention": (),
    "attention_mask": (),
    "philox_words": ("cpp",),
    "random_ids": ("cpp",),
    "random_keep": ("cpp",),
    "random_uniform": ("cpp",),
    "random_normal": ("cpp",),
}
OPERATORS = tuple(KERNELS)
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
_LIBRARY = Path(__file__).with_name("_csrc.so")
_OLDEST_TORCH = (2, 11)
_REGISTERED = ("window_attention", "window_attention_backward", "philox_words", "instruction_set", "built_with_cuda")


def _load() -> str | None:
    """Load the C++ operators; what stands in the way, or None."""
    if not _LIBRARY.is_file():
        return f"{_LIBRARY.name} is not built: `pip install .` again where there are torch and a C++ compiler"
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < _OLDEST_TORCH:
        return f"{_LIBRARY.name} needs torch {'.'.join(map(str, _OLDEST_TORCH))} or later, this is {torch.__version__}"
    try:
        torch.ops.load_library(str(_LIBRARY))
    except OSError as error:
        return f"{_LIBRARY.name} does not load: {error}"
    if not all(hasattr(getattr(torch.ops, NAMESPACE), name) for name in _REGISTERED):
        return f"{_LIBRARY.name} was built of other sources or for another name than {NAMESPACE}: build it again here"
    return None


WHY_NO_CPP = _load()
_asked: str | None = None


def why_not(operator: str, name: str, device: torch.device) -> str | None:
    """Why backend ``name`` cannot run ``operator`` on ``device``; None if it can."""
    if name == "reference":
        return None
    if name not in KERNELS[operator]:
        return f"it has no {name} kernel"
    return {"cpp": _why_no_cpp, "triton": _why_no_triton, "cuda": _why_no_cuda}[name](device)


def _why_no_cpp(device: torch.device) -> str | None:
    if WHY_NO_CPP is not None:
        return WHY_NO_CPP
    return None if device.type == "cpu" else f"the C++ kernels run on CPU, the tensors are on {device.type}"


def _why_no_triton(device: torch.device) -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type == ("cpu" if interpreted else "cuda"):
        return None
    runs = "on CPU under TRITON_INTERPRET=1" if interpreted else "on NVIDIA GPUs (on CPU: TRITON_INTERPRET=1)"
    return f"the Triton kernels run {runs}, the tensors are on {device.type}"


def _why_no_cuda(device: torch.device) -> str | None:
    if WHY_NO_CPP is not None:
        return WHY_NO_CPP
    if not getattr(torch.ops, NAMESPACE).built_with_cuda():
        return f"{_LIBRARY.name} was built without CUDA: build it again where nvcc is on PATH"
    return None if device.type == "cuda" else f"the CUDA kernels run on NVIDIA GPUs, the tensors are on {device.type}"


def choose(operator: str, device: torch.device, unfit: Mapping[str, str] = MappingProxyType({})) -> str:
    """The backend that runs ``operator`` on ``device``: the one asked for, else the fastest that is proven there.

    unfit: {backend: why it has no kernel for this very call}. A backend that is asked for and unfit is an error.
    """
    asked = _asked or os.environ.get("MEDFAST_BACKEND")
    if not asked:
        fits = "cpp" not in unfit and why_not(operator, "cpp", device) is None
        return "cpp" if fits else "reference"
    one_of("MEDFAST_BACKEND" if _asked is None else "backend", asked, BACKENDS)
    reason = why_not(operator, asked, device) or unfit.get(asked)
    if reason is not None:
        raise RuntimeError(
            f"{operator} was asked to run on backend {asked!r} and cannot: {reason}; "
            "with no backend asked for, each operator runs on the fastest it has"
        )
    return asked


def reference_only(definition: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """``definition`` as the public operator: no other backend has it, so one that is asked for by name is an error."""

    @wraps(definition)
    def operator(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        choose(definition.__name__, torch.device("cpu"))  # on whatever device
        return definition(*args, **kwargs)

    return operator


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run the operators on backend ``name``, one of BACKENDS, in the whole process.

    Raises ValueError for other names, and RuntimeError with the reason where the backend is not there, or, when an
    operator is called, where it has no kernel there or cannot run on those tensors.
    """
    global _asked
    one_of("backend", name, BACKENDS)
    if name == "cpp" and WHY_NO_CPP is not None:
        raise RuntimeError(f"backend 'cpp' is not there: {WHY_NO_CPP}")
    before, _asked = _asked, name
    try:
        yield
    finally:
        _asked = before


def devices() -> list[torch.device]:
    """One of each kind that is here."""
    return [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]


def facts() -> dict[str, str]:
    """What is built and where it runs."""
    facts = {"torch": torch.__version__, "operators": f"torch.ops.{NAMESPACE}"}
    if WHY_NO_CPP is None:
        facts["C++ library"] = str(_LIBRARY)
        facts["instruction set"] = getattr(torch.ops, NAMESPACE).instruction_set()
        facts["threads"] = str(torch.get_num_threads())
    return facts
