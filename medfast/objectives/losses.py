"""Prototype cross-entropy with centring and sharpening, and L1 on hidden voxels; fp32 at least, under any autocast."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F


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
    """sum |prediction - target| / (count + 1e-5) over the voxels in ``where``, mean over samples (SMART eq. 6, SMIT).

    prediction, target: (b, c, *size), mean over c; where: (b, *size) bool.
    """
    error = (at_least_fp32(prediction) - at_least_fp32(target)).abs().mean(dim=1)
    weight = where.to(error.dtype)
    return ((error * weight).flatten(1).sum(dim=1) / (weight.flatten(1).sum(dim=1) + 1e-5)).mean()


def masked_mse(prediction: Tensor, target: Tensor, where: Tensor) -> Tensor:
    """Squared error, mean over the voxels in ``where`` of a sample, then over samples (SDDA-MAE).

    prediction, target: (b, c, *size), mean over c; where: (b, *size) bool.
    """
    error = (at_least_fp32(prediction) - at_least_fp32(target)).square().mean(dim=1)
    return mean_of_means(error.flatten(1), where.to(error.dtype).flatten(1))


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
