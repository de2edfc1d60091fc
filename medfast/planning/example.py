"""A batch of the shapes that a configuration's data pipeline makes, without any data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from medfast.types import Batch, Key, Objective

__all__ = ["example", "view_size"]

TURNS = ("rotation", "flip")


def view_size(data: Mapping[str, Any]) -> tuple[int, ...]:
    """Voxels per axis of a view: ``data.size`` is one length for a cube, or a list."""
    size = data.get("size", 128)
    return (size,) * 3 if isinstance(size, int) else tuple(size)


def example(objective: Objective, data: Mapping[str, Any], count: int, channels: int = 1) -> Batch:
    """``count`` samples of noise in [0, 1], fp32, on the CPU, with all that the objective reads beside them."""
    size = view_size(data)
    key = Key(0, 0, torch.arange(count))
    generator = torch.Generator().manual_seed(1)
    views = tuple(torch.rand(count, channels, *size, generator=generator) for _ in range(objective.views))
    targets = {name: draw(key.stack(objective.views)).chunk(objective.views)
               for name, draw in objective.ahead(size).items()}  # fmt: skip
    if "uncut" in objective.needs:
        targets["uncut"] = tuple(x.clone() for x in views)
    params = {name: torch.zeros(count, objective.views, dtype=torch.int64) for name in TURNS}
    return Batch(views, None, key, params={**params, "volume": torch.arange(count)}, targets=targets)
