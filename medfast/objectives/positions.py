"""Token by token between two views of one box: one is turned, the other has cells of noise, and tokens find each other.

Source: SimTROT (SimPROT, BTROT): rotation and flip of the un-masked view are undone on its feature map.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

import medfast_kernels as mk
from medfast.objectives.masking import hidden_voxels
from medfast.objectives.patches import Stride
from medfast.objectives.views import given_mask, grid_of, stack_views
from medfast.types import Backbone, Batch, Key, Masker

FLIPS = 3  # as the data pipeline numbers them: none, the last axis but one, the last one
_NOISE = 16  # layer of the role MASK for what fills a cell; maskers draw from the first few


def restored(features: Tensor, rotation: Tensor, flip: Tensor) -> Tensor:
    """Feature maps as they would lie without the turn of their volume: un-flipped, then turned back.

    features: (b, *grid, c). rotation, flip: (b,) int64, quarter turns of the plane of the last two grid axes, from the
    first towards the second, and the axis that was flipped after them (``FLIPS``). Every sample has its own; nothing
    waits for the device.
    """
    h, w = features.shape[-3:-1]
    place = torch.arange(h * w, device=features.device).view(h, w)
    tables = []
    for quarters in range(4):
        for axis in range(FLIPS):
            back = torch.flip(place, (axis - FLIPS,)) if axis else place
            tables.append(torch.rot90(back, -quarters, (0, 1)).flatten())
    index = torch.stack(tables)[rotation * FLIPS + flip]  # (b, h * w): where each token of the restored map lies now
    flat = features.flatten(-3, -2)
    index = index.view(len(features), *[1] * (flat.dim() - 3), -1, 1).expand_as(flat)
    return flat.gather(-2, index).view_as(features)


def shown(batch: Batch, mask: Masker, cell: Stride, spread: float, training: bool) -> tuple[Tensor, Tensor, Key | None]:
    """What the backbone is given, (2 * b, c, *size), which voxels of it are noise (2 * b, *size), and its key.

    The second view's hidden cells, of ``cell`` voxels, hold normal noise of deviation ``spread`` (SimTROT); the first
    view has none. The key is None outside training.
    """
    volume, key = stack_views(batch, 2)
    size, b = tuple(volume.shape[2:]), len(volume) // 2
    drawn = given_mask(batch, grid_of(size, cell)) or mask(grid_of(size, cell), key)
    hidden = hidden_voxels(drawn, cell, size)
    hidden = torch.cat((torch.zeros_like(hidden[:b]), hidden[b:]))
    noise = mk.random_normal(tuple(volume.shape[1:]), key=key.at(mk.Role.MASK, layer=_NOISE))
    volume = torch.where(hidden.unsqueeze(1), spread * noise.to(volume), volume)
    return volume, hidden, key if training else None


def position_tokens(backbone: Backbone, volume: Tensor, key: Key | None, turns: Mapping[str, Tensor]) -> Tensor:
    """(2 * b, n, c): tokens of the last stage, channels last, each at the place of the box that it is of.

    turns: "rotation" and "flip", (b, 2 views) int64. ValueError where the tokens of a square plane form no square.
    """
    features = backbone(volume, key=key).stages[-1]
    (h, w), (height, width) = features.shape[-3:-1], volume.shape[-2:]
    if height == width and h != w:
        raise ValueError(
            f"a {height} x {width} plane is turned by quarters, so its tokens must form a square, and they are {h} x "
            f"{w}: give the backbone one patch length on the last two axes"
        )
    rotation, flip = (turns[name].T.flatten() for name in ("rotation", "flip"))
    return restored(features, rotation, flip).flatten(1, -2)


def turns_of(batch: Batch, restore: bool) -> dict[str, Tensor]:
    """ "rotation" and "flip" of ``Batch.params``, zeros where features are not to be restored. ValueError without."""
    missing = {"rotation", "flip"} - set(batch.params)
    if missing:
        raise ValueError(f"the batch does not say {sorted(missing)}: set data.rotate and data.flip to [true, false]")
    found = {name: batch.params[name] for name in ("rotation", "flip")}
    return found if restore else {name: torch.zeros_like(value) for name, value in found.items()}
