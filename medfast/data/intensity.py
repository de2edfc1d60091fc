"""Intensity changes of a view, as numbers: which are drawn, from what range, and with what probability in which view.

The recipe is that of SMART's public code: noise, blur, multiplicative and additive brightness, contrast, gamma. It
states the ranges of blur (sigma 1-2 voxels), multiplicative (0.75-1.25) and additive (normal, 0.4) brightness and gamma
(0.7-1.5); the ranges of noise (standard deviation 0-0.1) and contrast (0.75-1.25) are the customary ones of the same
family of augmentations. Gibbs ringing, which SimTROT adds, has a strength in [0, 1]. All numbers are on the [0, 1]
scale after the HU window.

Order of execution: blur, gain, shift, contrast (about the view's mean), gamma, gibbs, noise; values are cut back to
[0, 1] after shift, contrast, gibbs and noise. Gibbs and noise come last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

import medfast_kernels as mk

__all__ = ["NEUTRAL", "OURS", "RANGES", "Change", "draw", "parse"]

# what leaves a view as it is; the order is that of the draws: append, never reorder
NEUTRAL = {"blur": 0.0, "gain": 1.0, "shift": 0.0, "contrast": 1.0, "gamma": 1.0, "noise": 0.0, "gibbs": 0.0}
OURS = ("gibbs", "noise")  # those that DALI's graph leaves to our own kernels
RANGES = {
    "blur": (1.0, 2.0), "gain": (0.75, 1.25), "shift": (0.0, 0.4), "contrast": (0.75, 1.25), "gamma": (0.7, 1.5),
    "noise": (0.0, 0.1), "gibbs": (0.0, 1.0),
}  # fmt: skip


class Change(NamedTuple):
    """p: probability in each view. low, high: uniform range, or mean and standard deviation where ``normal``."""

    name: str
    p: tuple[float, ...]
    low: float
    high: float
    normal: bool = False


def parse(intensity: Mapping[str, Mapping] | None, views: int) -> tuple[Change, ...]:
    """The YAML's ``intensity``, {name: {p: number or one per view, range: [low, high]}}, checked.

    ``range`` may be left out (``RANGES``); for "shift" it is [mean, standard deviation], or, with ``draw: uniform``, a
    range like the others. ValueError for anything else.
    """
    if intensity is not None and not isinstance(intensity, Mapping):
        raise ValueError(f"data.intensity is a mapping of {sorted(NEUTRAL)} to {{p: ...}} or null, got {intensity!r}")
    unknown = sorted(set(intensity or {}) - set(NEUTRAL))
    if unknown:
        raise ValueError(f"data.intensity does not know {unknown}; it knows {sorted(NEUTRAL)}")
    return tuple(_change(name, intensity[name], views) for name in NEUTRAL if intensity and name in intensity)


def _change(name: str, spec: Mapping, views: int) -> Change:
    where = f"data.intensity.{name}"
    known = {"p", "range", "draw"} if name == "shift" else {"p", "range"}
    if not isinstance(spec, Mapping) or "p" not in spec or set(spec) - known:
        more = ", draw: normal or uniform" if name == "shift" else ""
        raise ValueError(f"{where} takes {{p: probability or one per view, range: [low, high]{more}}}, got {spec!r}")
    normal = name == "shift" and spec.get("draw", "normal") == "normal"
    if spec.get("draw", "normal") not in ("normal", "uniform"):
        raise ValueError(f"{where}.draw is normal (range: mean, standard deviation) or uniform, got {spec['draw']!r}")
    p = list(spec["p"]) if isinstance(spec["p"], Sequence) else [spec["p"]] * views
    if len(p) != views or not all(0.0 <= float(x) <= 1.0 for x in p):
        raise ValueError(f"{where}.p is a probability in [0, 1], or one for each of {views} views, got {spec['p']!r}")
    low, high = (float(x) for x in spec.get("range", RANGES[name]))
    least = {"gamma": 1e-3, "blur": 1e-3, "shift": -1.0}.get(name, 0.0)
    most = 1.0 if name == "gibbs" else float("inf")
    if low < least or high > most or (high < 0.0 if normal else low > high):
        raise ValueError(f"{where}.range is [low, high] within [{least}, {most}], got {[low, high]}")
    return Change(name, tuple(float(x) for x in p), low, high, normal)


def draw(changes: Sequence[Change], key: mk.Key, views: int) -> dict[str, np.ndarray]:
    """Name -> (b, views) float32, neutral where the coin said no. ``key``: of one split, with role and layer set.

    Two numbers per change and view, at fixed places: switching one change off leaves the others as they were.
    """
    if not changes:
        return {}
    unit = mk.random_uniform((len(NEUTRAL), 2), key=key.stack(views)).double()
    unit = unit.reshape(views, -1, len(NEUTRAL), 2).transpose(0, 1)
    result = {}
    for change in changes:
        coin, value = unit[:, :, list(NEUTRAL).index(change.name)].unbind(-1)
        if change.normal:  # half a step up keeps the quantile of 0 finite
            value = change.low + change.high * torch.special.ndtri(value + 2.0**-25)
        else:
            value = change.low + (change.high - change.low) * value
        on = coin < torch.tensor(change.p, dtype=torch.float64)
        result[change.name] = torch.where(on, value, NEUTRAL[change.name]).numpy().astype(np.float32)
    return result
