"""What torch has to know of an operator of csrc beside its values: shapes, gradients, and what autocast does to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .._checks import NAMESPACE
from .._dispatch import WHY_NO_CPP


def register(
    name: str,
    fake: Callable[..., Any],
    *,
    save: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    fp32: bool = False,
) -> None:
    """Register the rules of the operator ``name``, where csrc is built.

    save and backward are ``setup_context`` and ``backward`` of ``torch.library.register_autograd``. fp32: under
    autocast 16-bit arguments are cast to fp32, as the public front casts them; without, an operator takes what it gets,
    which is right for those that only move numbers.
    """
    if WHY_NO_CPP is not None:
        return
    qualified = f"{NAMESPACE}::{name}"
    torch.library.register_fake(qualified, fake)
    if backward is not None:
        torch.library.register_autograd(qualified, backward, setup_context=save)
    if fp32:
        torch.library.register_autocast(qualified, "cpu", torch.float32)


def no_derivative(name: str) -> Callable[..., Any]:
    """The gradient of the gradient of operator ``name``: an error that says what to do."""

    def refuse(ctx, *grads):
        raise RuntimeError(
            f"{name} in C++ has no derivative; for second derivatives run the forward under "
            'medfast_kernels.backend("reference")'
        )

    return refuse
