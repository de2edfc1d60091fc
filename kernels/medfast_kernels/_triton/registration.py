"""Operators of Triton kernels under the package's namespace, known to torch whether or not Triton is installed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._checks import NAMESPACE, TRACED


def operator(
    name: str,
    schema: str,
    launch: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    save: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Any:
    """Register ``launch`` as the operator ``name`` for CUDA tensors, and for CPU tensors in Triton's interpreter.

    ``launch`` imports its kernels when it is called: Triton need not be there, and reads TRITON_INTERPRET at import.
    save and backward are ``setup_context`` and ``backward`` of ``torch.library.register_autograd``.
    """
    if not TRACED:  # nothing here runs on such a torch, but the package is imported
        return launch
    qualified = f"{NAMESPACE}::{name}"
    torch.library.define(qualified, schema)
    torch.library.impl(qualified, ("cpu", "cuda"), on_its_device(launch))
    torch.library.register_fake(qualified, fake)
    if backward is not None:
        torch.library.register_autograd(qualified, backward, setup_context=save)
    return getattr(getattr(torch.ops, NAMESPACE), name)


def on_its_device(launch: Callable[..., Any]) -> Callable[..., Any]:
    """``launch`` on the device of its first tensor: Triton launches on the current one, whatever it is given."""

    @functools.wraps(launch)
    def run(*args: Any) -> Any:
        device = next(x.device for x in args if isinstance(x, Tensor))
        if device.type != "cuda":
            return launch(*args)
        with torch.cuda.device(device):
            return launch(*args)

    return run


def no_derivative(name: str) -> Callable[..., Any]:
    """The gradient of the gradient of operator ``name``: an error that says what to do."""

    def refuse(ctx, *grads):
        raise RuntimeError(
            f"{name} has no second derivative on this backend; run its forward under "
            'medfast_kernels.backend("reference")'
        )

    return refuse


def unfit(x: Tensor) -> dict[str, str]:
    """For ``choose``: why no Triton kernel takes a call with ``x``, if so."""
    return {"triton": "it computes in fp32, the tensors are torch.float64"} if x.dtype == torch.float64 else {}
