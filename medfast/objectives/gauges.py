"""Collapse gauges: numbers that are watched, never trained."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["agreement", "collapse_gauges", "effective_rank", "prototype_entropy", "same_position"]


@torch.no_grad()
def effective_rank(tokens: Tensor) -> Tensor:
    """How many directions a (tokens, dim) matrix uses: exp of the entropy of its normalised singular values, fp64.

    1 where all tokens are the same up to a factor, min(tokens, dim) where all directions are used evenly, nan where a
    token is not finite. Not centred, so a constant output reads as rank 1 and not as the rank of its rounding noise.
    Source: Roy and Vetterli, EUSIPCO 2007; as a gauge of pretraining: RankMe, Garrido et al., ICML 2023.
    """
    if tokens.dim() != 2:
        raise ValueError(f"effective_rank takes a (tokens, dim) matrix, got shape {tuple(tokens.shape)}")
    x = tokens.detach().double()
    if not torch.isfinite(x).all():
        return x.new_tensor(float("nan"))
    gram = x.T @ x if x.shape[1] <= x.shape[0] else x @ x.T
    singular = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    total = singular.sum()
    if total == 0:
        return x.new_ones(())
    return torch.special.entr(singular / total).sum().exp()


@torch.no_grad()
def prototype_entropy(probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """(entropy of the mean distribution, mean entropy) of (rows, K) probabilities, in nats, fp64.

    The first is 0 where every row picks the same prototype and ln K where all prototypes are used evenly; the second is
    0 where every row is certain and ln K where no row says anything. Their difference is the information that a row's
    prototype carries about the row, 0 for both ways to collapse.
    """
    if probabilities.dim() != 2:
        raise ValueError(f"prototype_entropy takes (rows, K) probabilities, got shape {tuple(probabilities.shape)}")
    p = probabilities.detach().double()
    return torch.special.entr(p.mean(0)).sum(), torch.special.entr(p).sum(1).mean()


@torch.no_grad()
def agreement(z: Tensor) -> Tensor:
    """Mean cosine of what is the same in both views. z: (2 * b, ..., dim) L2-normalised, view after view."""
    one, other = z.chunk(2)
    return (one * other).sum(dim=-1).mean()


@torch.no_grad()
def same_position(z: Tensor) -> Tensor:
    """Mean cosine of the tokens at one position of different samples of a view, 1 where a token tells its place alone.

    z: (2 * b, positions, dim) L2-normalised, view after view; nan for b = 1, which has no other sample.
    """
    x = z.unflatten(0, (2, -1))
    b = x.shape[1]
    if b == 1:
        return x.new_full((), float("nan"))
    pairs = x.sum(dim=1).square().sum(dim=-1) - x.square().sum(dim=(1, 3))
    return (pairs / (b * (b - 1))).mean()


def collapse_gauges(tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gauges of what ``Objective.tokens`` gives: "rank_student", "rank_teacher", and of the prototypes "entropy_used",
    "entropy_each" and their difference, "information".
    """
    gauges = {f"rank_{part}": effective_rank(tokens[part]) for part in ("student", "teacher") if part in tokens}
    if "prototypes" in tokens:
        used, each = prototype_entropy(tokens["prototypes"])
        gauges |= {"entropy_used": used, "entropy_each": each, "information": used - each}
    return gauges
