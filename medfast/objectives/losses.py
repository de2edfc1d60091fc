"""Prototype cross-entropy with centring and sharpening, and errors on hidden voxels; fp32 at least, under autocast."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medfast.objectives.patches import Stride, cell_sums
from medfast.types import Mask


def at_least_fp32(x: Tensor) -> Tensor:
    """fp16 and bf16 become fp32; fp32 and fp64 stay."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Centres(nn.Module):
    """Running means of the teacher's raw logits, subtracted before its softmax (DINO's centring; SMART IV.C).

    names: of the distillations; each has one, a buffer (prototypes,), zero at the start. Centres move in ``absorb``
    only, so that all micro-batches and ranks of an optimizer step see the same.
    """

    def __init__(self, names: Iterable[str], prototypes: int, momentum: float = 0.9):
        super().__init__()
        self.names, self.momentum = tuple(names), momentum
        for name in self.names:
            self.register_buffer(name, torch.zeros(prototypes))

    def forward(self, name: str, logits: Tensor, temperature: Tensor | float) -> Tensor:
        """Teacher distribution softmax((logits - centre) / temperature) (SMART eq. 3 with centring), no gradient.

        logits: (..., prototypes); returns the same shape.
        """
        with torch.no_grad():
            return ((at_least_fp32(logits) - self.get_buffer(name)) / temperature).softmax(dim=-1)

    @torch.no_grad()
    def absorb(self, sums: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """sums: name -> ((prototypes,) sum of raw logits over the whole batch, how many rows that was)."""
        for name in self.names:
            (total, count), centre = sums[name], self.get_buffer(name)
            centre.lerp_((total / count).to(centre), 1.0 - self.momentum)


def cross_entropy(logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """-sum_k target_k log softmax(logits / temperature)_k (SMART eqs. 2, 4, 5), one value per row.

    logits, target: (..., prototypes), student's raw logits and teacher's distribution; returns (...).
    The papers' sums over i = 1..N run over the prototypes of one token.
    """
    return -(target * F.log_softmax(at_least_fp32(logits) / temperature, dim=-1)).sum(dim=-1)


def mean_of_means(values: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean within each sample, then the mean over samples, so a loss does not depend on the batch split.

    values, weight: (b, m), weight 0 or 1; a sample without any weight counts as 0 (iBOT: max(count, 1)).
    """
    return ((values * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1.0)).mean()


def masked_l1(prediction: Tensor, target: Tensor, where: Tensor) -> Tensor:
    """sum |prediction - target| / (count + 1e-5) over the voxels in ``where``, mean over samples (RCR, MST).

    prediction, target: (b, c, *size), mean over c; where: (b, *size) bool.
    """
    error = (at_least_fp32(prediction) - at_least_fp32(target)).abs().mean(dim=1)
    weight = where.to(error.dtype)
    return ((error * weight).flatten(1).sum(dim=1) / (weight.flatten(1).sum(dim=1) + 1e-5)).mean()


def hidden_l1(
    prediction: Tensor, target: Tensor, mask: Mask, stride: Stride, valid: Tensor | None = None
) -> Tensor:  # fmt: skip
    """``masked_l1`` over the voxels of hidden cells (SMART eq. 6, SMIT, SimMIM).

    prediction, target: (b, c, *size), mean over c. stride: voxels of a cell. valid: (b, *size) bool, those that count.
    """
    error = (at_least_fp32(prediction) - at_least_fp32(target)).abs().mean(dim=1)
    total, count = _hidden_sums(error, mask, stride, valid)
    return (total / (count + 1e-5)).mean()


def hidden_mse(
    prediction: Tensor, target: Tensor, mask: Mask, stride: Stride, valid: Tensor | None = None
) -> Tensor:  # fmt: skip
    """Squared error, mean over the voxels of hidden cells, then over samples (SDDA-MAE). Arguments: ``hidden_l1``'s."""
    error = (at_least_fp32(prediction) - at_least_fp32(target)).square().mean(dim=1)
    total, count = _hidden_sums(error, mask, stride, valid)
    return (total / count.clamp(min=1.0)).mean()


def _hidden_sums(error: Tensor, mask: Mask, stride: Stride, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """(sum of the error, number of voxels), (b,) each, over the hidden cells of each sample. error: (b, *size).

    Voxels are added up cell by cell and hidden cells picked by their ids, so no mask of voxels is made.
    """
    weight = torch.ones_like(error[:1]) if valid is None else valid.to(error.dtype)
    sums, counts = cell_sums(error if valid is None else error * weight, stride), cell_sums(weight, stride)
    if mask.hidden is None:
        where = mask.where.flatten(1).to(error.dtype)
        return (sums * where).sum(dim=1), (counts * where).sum(dim=1)
    return sums.gather(1, mask.hidden).sum(dim=1), counts.expand_as(sums).gather(1, mask.hidden).sum(dim=1)


def patch_mse(prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Squared error, mean over the voxels of the hidden patches of a sample, then over samples (MAE, section 3).

    prediction, target: (b, m, voxels of a patch), hidden patches only; weight: of the same shape, 0 for padding.
    """
    error = (at_least_fp32(prediction) - at_least_fp32(target)).square()
    weight = weight.to(error.dtype)
    return ((error * weight).flatten(1).sum(dim=1) / weight.flatten(1).sum(dim=1).clamp(min=1.0)).mean()


def entropy(distributions: Tensor) -> Tensor:
    """Entropy in nats of the mean row of (..., prototypes): log K where all of them are used alike, 0 on collapse."""
    mean = distributions.flatten(0, -2).mean(dim=0)
    return torch.special.entr(mean).sum().detach()
