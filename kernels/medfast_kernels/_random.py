"""Arguments of draws, checked once for all backends."""

from __future__ import annotations

import torch

from ._checks import INTEGER, check_key
from .key import Key


def check_count(name: str, count: int) -> None:
    if not isinstance(count, INTEGER) or isinstance(count, bool):
        raise TypeError(f"{name} must be an int, got {type(count).__name__}")
    if count < 0:
        raise ValueError(f"{name} must be at least 0, got {count}")


def check_shape(shape: tuple[int, ...] | int) -> tuple[int, ...]:
    shape = (shape,) if isinstance(shape, INTEGER) else tuple(shape)
    for length in shape:
        check_count("every entry of shape", length)
    return shape


def check_ids(n: int, count: int) -> None:
    check_count("n", n)
    check_count("count", count)
    if count > n:
        raise ValueError(f"count must be in [0, n] = [0, {n}], got {count}")


def check_rate(rate: float) -> None:
    if not isinstance(rate, (int, float)) or isinstance(rate, bool):
        raise TypeError(f"rate must be a float, got {type(rate).__name__}")
    if not 0.0 <= rate <= 1.0:
        raise ValueError(f"rate is the probability of dropping, in [0, 1], got {rate}")


def device_of(key: Key, device: torch.device | str | None) -> torch.device:
    """Where a draw is made: ``device``, or where key.sample is. Refuses a key that addresses no samples."""
    check_key(key)
    assert key.sample is not None
    return key.sample.device if device is None else torch.device(device)
