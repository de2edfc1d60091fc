"""Functions of time. t in [0, 1) is step / steps of the whole run, so nothing here counts epochs or steps."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Points = Sequence[tuple[float, float]]


def points(schedule: float | Points) -> tuple[tuple[float, float], ...]:
    """A schedule of a temperature as checked (t, value) points: a plain number is constant; t must not decrease and
    stay in [0, 1], values must be positive."""
    if isinstance(schedule, int | float):
        schedule = ((0.0, schedule),)
    try:
        pairs = tuple((float(at), float(value)) for at, value in schedule)
    except (TypeError, ValueError):
        raise ValueError(f"a schedule is a number or a list of [t, value] pairs, got {schedule!r}") from None
    if not all(value > 0.0 for _, value in pairs):
        raise ValueError(f"the values of a schedule must be above 0, got {schedule!r}")
    times = [at for at, _ in pairs]
    if not pairs or times != sorted(times) or not 0.0 <= times[0] <= times[-1] <= 1.0:
        raise ValueError(f"the times of a schedule must not decrease and lie in [0, 1], got {schedule!r}")
    return pairs


def piecewise(schedule: Points, t: Tensor | float) -> Tensor:
    """Linear between the points, constant outside them; two points at one t are a step, which takes the later value.

    schedule: as ``points`` returns it. t: 0-dim tensor or number. Returns a 0-dim tensor of t's dtype and device, with
    arithmetic on t alone, so nothing waits for the device.
    """
    t = torch.as_tensor(t)
    value = torch.full_like(t, schedule[0][1])
    for (start, before), (stop, after) in zip(schedule, schedule[1:], strict=False):
        share = ((t - start) / (stop - start)).clamp(0.0, 1.0) if stop > start else (t >= start).to(t.dtype)
        value = value + (after - before) * share
    return value


def cosine(start: float, stop: float, t: float) -> float:
    """Half a cosine from ``start`` at t = 0 to ``stop`` at t = 1 (SMART III.D: teacher momentum .996 to 1)."""
    return stop - 0.5 * (stop - start) * (1.0 + math.cos(math.pi * t))
