"""Which backend runs an operator: the only code that asks about devices, the environment and what is built.

reference  plain PyTorch, every operator, every device
cpp        csrc/, CPU tensors; the default there for the operators it has
A backend that is asked for by name (``backend``, MEDFAST_BACKEND) and cannot run, or has no kernel, is an error.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch

from ._checks import NAMESPACE, one_of

BACKENDS = ("reference", "cpp")
CPP_OPERATORS = ("window_attention", "philox_words", "random_ids", "random_keep", "random_uniform", "random_normal")
OPERATORS = (*CPP_OPERATORS, "class_attention", "attention_mask")
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
_LIBRARY = Path(__file__).with_name("_csrc.so")
_OLDEST_TORCH = (2, 11)
_REGISTERED = ("window_attention", "window_attention_backward", "philox_words", "instruction_set")


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
    if operator not in CPP_OPERATORS:
        return "it has no C++ kernel"
    if WHY_NO_CPP is not None:
        return WHY_NO_CPP
    return None if device.type == "cpu" else f"the C++ kernels run on CPU, the tensors are on {device.type}"


def choose(operator: str, device: torch.device) -> str:
    """The backend that runs ``operator`` on ``device``: the one asked for, else the fastest there is."""
    asked = _asked or os.environ.get("MEDFAST_BACKEND")
    if not asked:
        return "cpp" if why_not(operator, "cpp", device) is None else "reference"
    one_of("MEDFAST_BACKEND" if _asked is None else "backend", asked, BACKENDS)
    reason = why_not(operator, asked, device)
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
    """Run the operators on backend ``name``, "reference" or "cpp", in the whole process.

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
