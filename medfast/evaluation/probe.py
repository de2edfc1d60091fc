"""Linear probe: how well a linear map of a frozen encoder's tokens tells which organ they lie in.

The probe is ridge regression on one-hot classes, in closed form, so its result depends on features alone: no learning
rate, no stopping, no draw. Token-wise linear probes: Oquab et al., DINOv2, 2023, section 7.4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from medfast.objectives.held_out import AT_ONCE, crops
from medfast.types import Batch, Features, Objective

__all__ = ["CELL", "Tokens", "balanced_accuracy", "class_of_cells", "collect", "fit", "map_of", "organs_of", "probe"]

CELL = 4  # voxels per axis of what is classified, whatever the strides of an encoder
MAJORITY = 0.5  # of a cell's voxels must be of one organ; other cells are left out
RIDGE = 0.1  # features have variance 1; hundreds of alike ones of a few volumes overfit with a tenth of it


class Tokens(NamedTuple):
    """features: (n, width) fp32. organ: (n,) int64, from 1."""

    features: Tensor
    organ: Tensor


class Probe(NamedTuple):
    """weights: (1 + width, classes) fp64 of standardised features, the first row for the constant; classes: (classes,)
    int64, what its columns stand for."""

    mean: Tensor
    scale: Tensor
    weights: Tensor
    classes: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """(n, width) -> (n,) int64, the most likely organ."""
        x = (features.double() - self.mean) / self.scale
        return self.classes[(self.weights[0] + x @ self.weights[1:]).argmax(dim=1)]


def fit(tokens: Tokens) -> Probe:
    """Ridge regression in which each class weighs as much as any other, fp64. ValueError for fewer than two classes."""
    x, (classes, which, count) = tokens.features.double(), tokens.organ.unique(return_inverse=True, return_counts=True)
    if len(classes) < 2:
        raise ValueError(f"a probe tells classes apart, and these {len(x)} tokens are of {classes.tolist()}")
    weight = (1.0 / (count.double() * len(classes)))[which].unsqueeze(1)  # they sum to 1
    mean = (weight * x).sum(dim=0)
    scale = (weight * (x - mean).square()).sum(dim=0).sqrt().clamp_min(1e-12)
    x = F.pad((x - mean) / scale, (1, 0), value=1.0)
    penalty = torch.full((x.shape[1],), RIDGE, dtype=x.dtype, device=x.device)
    penalty[0] = 0.0
    target = F.one_hot(which, len(classes)).double()
    weights = torch.linalg.solve(x.T @ (weight * x) + penalty.diag(), x.T @ (weight * target))
    return Probe(mean, scale, weights, classes)


def balanced_accuracy(told: Tensor, truth: Tensor) -> float:
    """Mean over the classes of ``truth`` of the share of their tokens that are told right; chance is 1 / classes."""
    return float(np.mean([(told[truth == organ] == organ).double().mean().item() for organ in truth.unique()]))


def probe(fitted: Tokens, held_out: Tokens) -> float:
    """Balanced accuracy on ``held_out`` of the probe that ``fitted`` gives."""
    return balanced_accuracy(fit(fitted)(held_out.features), held_out.organ)


@torch.no_grad()
def collect(objective: Objective, stream, count: int) -> Tokens:
    """Tokens of the first ``count`` crops of a stream whose store knows the organs; no drop path, nothing is hidden.

    Cells of ``CELL`` voxels. ValueError where a volume has no label.
    """
    training = objective.training
    objective.eval()
    features, organs = [], []
    for batch in crops(stream, count, AT_ONCE):
        organ = class_of_cells(organs_of(stream.store, batch))
        known = organ > 0
        features.append(map_of(objective.encode(batch)[0], organ.shape[1:])[known])
        organs.append(organ[known])
    objective.train(training)
    return Tokens(torch.cat(features), torch.cat(organs))


def map_of(features: Features, cells: Sequence[int]) -> Tensor:
    """All stages side by side, each brought to the grid ``cells``: (b, *cells, sum of channels) fp32.

    Coarser maps are repeated, finer ones averaged. Maps of images stand for slices, cells (1, h, w).
    """
    maps = []
    for stage in features.stages:
        x = stage.float().movedim(-1, 1)
        x = x.unsqueeze(2) if x.dim() == 4 else x
        maps.append(F.interpolate(x, tuple(cells), mode="area").movedim(1, -1))
    return torch.cat(maps, dim=-1)


def organs_of(store, batch: Batch, view: int = 0) -> Tensor:
    """(b, *size) uint8: what lies where a view was cut; 0 outside the volume. ValueError without labels."""
    assert batch.boxes is not None
    boxes = batch.boxes[:, view].long().numpy()
    return torch.stack([_cut(store, int(v), box) for v, box in zip(batch.params["volume"], boxes, strict=True)])


def _cut(store, volume: int, box: np.ndarray) -> Tensor:
    label = store.label(volume)
    if label is None:
        raise ValueError(f"volume {store.records[volume]['id']} has no label, so there is nothing to probe")
    start, stop = box[:3], box[3:]
    out = np.zeros(stop - start, dtype=label.dtype)
    low, high = np.maximum(start, 0), np.minimum(stop, label.shape)
    inside = tuple(slice(a, b) for a, b in zip(low - start, high - start, strict=True))
    out[inside] = label[tuple(slice(a, b) for a, b in zip(low, high, strict=True))]
    return torch.from_numpy(out)


def class_of_cells(organ: Tensor, cell: int = CELL) -> Tensor:
    """(b, *size) classes -> (b, *cells) int64: the class of more than ``MAJORITY`` of a cell's voxels, 0 where none is.

    An axis shorter than a cell makes one cell.
    """
    lengths = [min(cell, n) for n in organ.shape[1:]]
    names = organ.unique()
    shares = torch.stack([F.avg_pool3d((organ == name).float().unsqueeze(1), lengths)[:, 0] for name in names])
    most, which = shares.max(dim=0)
    return torch.where(most > MAJORITY, names.long()[which], 0)
