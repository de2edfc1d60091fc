"""Views as one batch: view by view along the batch axis, so that student and teacher run once, not once per view."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from medfast.objectives.patches import Stride, per_axis
from medfast.types import Batch, Key, Mask


def stack_views(batch: Batch, views: int) -> tuple[Tensor, Key]:
    """(views * b, c, *size) and the key of that stack. ValueError where views are missing or their sizes differ."""
    shapes = [tuple(view.shape) for view in batch.views]
    if len(shapes) != views or len(set(shapes)) != 1:
        raise ValueError(f"this objective wants {views} views of one shape, got {shapes}: see data.views and data.size")
    key = batch.key
    if key.sample is None:
        key = key._replace(sample=torch.arange(shapes[0][0], device=batch.views[0].device))
    return torch.cat(batch.views), key.stack(views)


def stack_valid(batch: Batch) -> Tensor | None:
    """(views * b, *size) bool, False on padding; None where no view was padded."""
    if all(valid is None for valid in batch.valid):
        return None
    whole = (
        torch.ones_like(view[:, 0], dtype=torch.bool) if valid is None else valid
        for view, valid in zip(batch.views, batch.valid, strict=True)
    )
    return torch.cat(tuple(whole))


def judged(batch: Batch) -> Tensor:
    """(views * b, *size) bool: the voxels that a whole view is held to, all of them without padding."""
    valid = stack_valid(batch)
    return (
        torch.ones_like(torch.cat([view[:, 0] for view in batch.views]), dtype=torch.bool) if valid is None else valid
    )


def given_mask(batch: Batch, cells: tuple[int, ...]) -> Mask | None:
    """The fixed masks of ``batch.targets["mask"]`` (one (b, *cells) bool per view), or None where there are none.

    The mask has no ids: counts may differ between samples, and how many cells are hidden only the device knows, so
    asking would wait for it. Logits are then made for all tokens, which validation and reports can afford.
    """
    if "mask" not in batch.targets:
        return None
    where = torch.cat(batch.targets["mask"])
    if where.shape[1:] != torch.Size(cells) or where.dtype != torch.bool:
        raise ValueError(f"targets['mask'] must be bool of {cells} cells, got {where.dtype} {tuple(where.shape)}")
    return Mask(where)


def grid_of(size: tuple[int, ...], stride: Stride) -> tuple[int, ...]:
    """Cells of ``stride`` voxels, one number or one per axis, that cover ``size``, per axis."""
    return tuple(math.ceil(length / s) for length, s in zip(size, per_axis(stride, len(size)), strict=True))


def split_views(x: Tensor, views: int) -> tuple[Tensor, ...]:
    """Undo ``stack_views``: one (b, ...) tensor per view."""
    return x.chunk(views)
