"""Checks that more than one operator makes of its arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from .key import Key

NAMESPACE = (__package__ or "medfast_kernels").replace(".", "_")  # of torch.ops: a vendored copy gets its own
Share = TypeVar("Share", bound="float | Tensor | None")


def one_of(name: str, value: str, accepted: Sequence[str]) -> None:
    if value not in accepted:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, accepted))}, got {value!r}")


def with_samples(key: Key | None, batch: int, device: torch.device) -> Key:
    """``key`` with its samples filled in: 0, 1, ... where there are none."""
    if key is None:
        raise ValueError("a draw needs key, a medfast_kernels.Key; got None")
    if not isinstance(key, Key):
        raise TypeError(f"key must be a medfast_kernels.Key, got {type(key).__name__}")
    if key.sample is None:
        return key._replace(sample=torch.arange(batch, device=device))
    if tuple(key.sample.shape) != (batch,):
        raise ValueError(f"key.sample must be (b,) = ({batch},), got {tuple(key.sample.shape)}")
    return key


def within(value: Share, name: str, low: float, high: float) -> Share:
    """``value``, or ValueError where it, or an entry of it, is outside [low, high] or NaN.

    Tensors are read on a CPU only: elsewhere the answer would cost a synchronisation.
    """
    if isinstance(value, Tensor):
        return _within(value, name, low, high) if value.device.type == "cpu" else value  # type: ignore[return-value]
    if value is not None and not low <= value <= high:
        raise ValueError(f"{name} must be in [{low}, {high}], got {value}")
    return value


# An operator, because a compiled graph can hold no branch on what a tensor contains.
@torch.library.custom_op(f"{NAMESPACE}::within", mutates_args=())
def _within(value: Tensor, name: str, low: float, high: float) -> Tensor:
    if value.isnan().any():
        raise ValueError(f"{name} holds NaN: {int(value.isnan().sum())} of {value.numel()} entries")
    if not ((value >= low) & (value <= high)).all():
        raise ValueError(f"{name} must be in [{low}, {high}], got {value.min().item()} to {value.max().item()}")
    return value.clone()


@_within.register_fake
def _(value: Tensor, name: str, low: float, high: float) -> Tensor:
    return torch.empty_like(value)
