"""Entries of a configuration's data section, checked before anything is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .cutter import SPLITS
from .units import UNITS

__all__ = ["check", "window_of"]

_EXECUTORS = ("torch", "dali")
_WINDOWS = {"HU": (-500.0, 500.0), "percentile": (0.0, 1000.0), "zscore": (-3000.0, 3000.0)}


def window_of(window: Sequence[float] | None, recipe: Mapping[str, Any]) -> tuple[float, float]:
    """The window that is meant; ValueError for one of HU where the store holds something else."""
    unit = recipe.get("unit", "HU")
    low, high = _WINDOWS[unit] if window is None else window if len(window) == 2 else (0, 0)
    if not low < high:
        raise ValueError(f"data.window is [low, high] in the store's unit with low < high, or null, got {window!r}")
    least, most, _ = UNITS[unit]
    if unit != "HU" and not (least <= low and high <= most):
        raise ValueError(f"data.window={list(window or ())} is none of this store: its unit is {unit}, from {least} to "
                         f"{most}. Set data.window=null for {list(_WINDOWS[unit])}, or one of your own")  # fmt: skip
    return float(low), float(high)


def check(*, executor, workers, holdout, batch, split, skip, patience) -> None:
    """Refuse, with ValueError, values of the data section that fit their annotation and nothing else."""
    if executor not in _EXECUTORS:
        raise ValueError(f"data.executor is one of {list(_EXECUTORS)}, got {executor!r}")
    if not isinstance(workers, int) or workers < 0:
        raise ValueError(f"data.workers is a number of threads or processes, 0 for none, got {workers!r}")
    if not 0.0 < holdout < 1.0:
        raise ValueError(f"data.holdout is a share of the patients between 0 and 1, both excluded, got {holdout!r}")
    if not isinstance(batch, int) or batch < 1:
        raise ValueError(f"batch is the number of samples of a step, at least 1, got {batch!r}")
    if split not in SPLITS:
        raise ValueError(f"split is one of {list(SPLITS)}, got {split!r}")
    if not isinstance(skip, int) or skip < 0:
        raise ValueError(f"data.skip is how many damaged volumes may be left out, 0 for none, got {skip!r}")
    if not patience > 0:
        raise ValueError(f"data.patience is a number of seconds above 0, got {patience!r}")
