"""RCR's inner cut-out: boxes of a view are filled with noise, and others with what another sample has at that place.

Source: Tang et al., CVPR 2022, arXiv 2111.14791, and its public code, where boxes are dropped until the sum of their
volumes, overlaps counted twice, reaches a share of the view's. Drawn per (seed, step, slot, view), on the host.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import medfast_kernels as mk
from medfast_kernels import Key, Role

__all__ = ["Cutout", "boxes", "cut", "parse", "partners"]

_LAYER = 32  # of the role AUGMENT: partner, then boxes of noise, then boxes of the partner; two splits each
_NOISE = 64  # of the role NOISE, above the layers of the splits, under which intensity noise is drawn
_AT_ONCE = 32
Box = tuple[slice, slice, slice]


class Cutout(NamedTuple):
    """share: most of a view's volume that the boxes of a pass add up to, drawn from [0, share). side: smallest and
    largest side of a box over the view's. swap: there is a second pass, that copies from another sample."""

    share: float = 0.3
    side: tuple[float, float] = (0.05, 0.25)
    swap: bool = True


def parse(value: Mapping[str, Any] | bool | None) -> Cutout | None:
    """data.cutout: true for RCR's numbers, {share, side, swap} for others, null or false for none. ValueError."""
    if not value:
        return None
    try:
        given = Cutout() if value is True else Cutout(**dict(value))
        low, high = (float(x) for x in given.side)
        share = float(given.share)
    except (TypeError, ValueError):
        raise ValueError(f"data.cutout takes true, null or {{share, side: [low, high], swap}}, got {value!r}") from None
    if not 0.0 < share <= 1.0 or not 0.0 < low <= high <= 1.0 or not isinstance(given.swap, bool):
        raise ValueError(f"data.cutout: share and side are shares of the view, swap is true or false, got {value!r}")
    return Cutout(share, (low, high), given.swap)


def partners(key: Key, batch: int, stream: int = 0) -> np.ndarray:
    """(b,) int64: the slot of the step's global batch that each sample copies from; its own means that it does not."""
    unit = mk.random_uniform(1, key=key.at(Role.AUGMENT, layer=_LAYER + stream))[:, 0].double().numpy()
    return np.floor(unit * batch).astype(np.int64)


def boxes(size: Sequence[int], cutout: Cutout, key: Key) -> list[Box]:
    """Boxes of one pass over one view; ``key`` of one sample, with role, view and layer set."""
    lengths = np.array(size)
    least = np.maximum(1, (cutout.side[0] * lengths).astype(int))
    most = np.maximum(least + 1, (cutout.side[1] * lengths).astype(int))
    found, covered, drawn = [], 0, np.empty((0, 2, 3))
    while True:
        if len(found) == len(drawn):  # number i of the draw is the same however many are drawn; the first is the budget
            count = 1 + 6 * (len(found) + _AT_ONCE)
            unit = mk.random_uniform(count, key=key)[0].double().numpy()
            budget, drawn = cutout.share * unit[0] * lengths.prod(), unit[1:].reshape(-1, 2, 3)
        if covered >= budget:
            return found
        start = np.floor(drawn[len(found), 0] * (lengths - least)).astype(int)
        side = least + np.floor(drawn[len(found), 1] * (most - least)).astype(int)
        stop = np.minimum(start + side, lengths)
        found.append(tuple(slice(int(a), int(b)) for a, b in zip(start, stop, strict=True)))
        covered += int((stop - start).prod())


def cut(
    view: Tensor, other: Tensor | None, cutout: Cutout, key: Key, index: int, stream: int = 0,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """A copy of ``view`` (c, *size) with its boxes filled. other: the same view of the partner, or None without one.

    key: of one sample. index: number of the view. out: where to put it. Noise is normal, scaled to [0, 1] within each
    box, as in the code.
    """
    view = view.clone() if out is None else out.copy_(view)
    size = tuple(view.shape[1:])
    found = boxes(size, cutout, key.at(Role.AUGMENT, view=index, layer=_LAYER + 2 + stream))
    shapes = [(len(view), *(s.stop - s.start for s in box)) for box in found]
    drawn = mk.random_normal(sum(map(math.prod, shapes)), key=key.at(Role.NOISE, view=index, layer=_NOISE + stream),
                             device=view.device)[0]  # fmt: skip
    for box, shape, noise in zip(found, shapes, drawn.split([math.prod(shape) for shape in shapes]), strict=True):
        low, high = torch.aminmax(noise)
        scale = (high - low).clamp(min=torch.finfo(noise.dtype).tiny)
        view[(slice(None), *box)] = ((noise - low) / scale).view(shape)
    if other is not None:
        for box in boxes(size, cutout, key.at(Role.AUGMENT, view=index, layer=_LAYER + 4 + stream)):
            view[(slice(None), *box)] = other[(slice(None), *box)]
    return view
