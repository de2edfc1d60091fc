"""The two ways in which prototypes are distilled: one vector per view across views, and hidden tokens of one view."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from medfast.objectives.losses import cross_entropy, entropy, mean_of_means
from medfast.objectives.masking import hidden_tokens
from medfast.types import Mask, Output

ROWS = 2048  # tokens whose logits exist at a time: 64 MiB of fp32 for 8192 prototypes, on each side

Layer = Callable[[Tensor], Tensor]


class Sides(NamedTuple):
    """What turns vectors into distributions: last layers of student and teacher, the student's temperature, and the
    centring and sharpening that makes the teacher's distribution of its raw logits."""

    student: Layer
    teacher: Layer
    temperature: float
    sharpen: Layer


class Term(NamedTuple):
    """loss: fp32 scalar. sums: (sum, count) of raw teacher logits for the centre. entropy: of the mean target, nats."""

    loss: Tensor
    sums: tuple[Tensor, Tensor]
    entropy: Tensor


def distil_image(student: Tensor, teacher: Tensor, sides: Sides) -> Term:
    """Cross-entropy of each view with the teacher's *other* view, both directions averaged (SMART eqs. 2, 4).

    student, teacher: (2 * b, width) normalised vectors, view after view.
    """
    raw = sides.teacher(teacher)
    target = sides.sharpen(raw)
    # rolling by half of the stack hands u's target to v and v's to u
    rows = cross_entropy(sides.student(student), target.roll(len(target) // 2, 0), sides.temperature)
    return Term(rows.mean(), (raw.sum(dim=0), raw.new_full((), len(raw))), entropy(target))


def distil_patches(student: Tensor, teacher: Tensor, mask: Mask, sides: Sides) -> Term:
    """Cross-entropy on the hidden tokens of the same view, mean over tokens, then samples and views (SMART eq. 5).

    student: (2 * b, m, width) normalised vectors of the tokens that ``hidden_tokens`` picks. teacher: (2 * b, n,
    width), all tokens, because all of them enter the centre; logits are made for the hidden ones alone.
    """
    chosen, weight = hidden_tokens(teacher, mask)
    rows, used = _rows(student.flatten(0, 1), chosen.flatten(0, 1), weight.flatten(), sides)
    # the last layer is linear without bias: the sum of all logits is the logits of the sum
    total = sides.teacher(teacher.sum(dim=(0, 1)))
    spread = torch.special.entr(used / weight.sum().clamp(min=1.0)).sum().detach()
    loss = mean_of_means(rows.unflatten(0, weight.shape), weight)
    return Term(loss, (total, total.new_full((), teacher[..., 0].numel())), spread)


def _rows(student: Tensor, teacher: Tensor, weight: Tensor, sides: Sides) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each row, (rows,), and the weighted sum of the targets, (prototypes,).

    Many rows are taken block by block, and again in the backward pass, so logits of all of them never exist at once.
    """

    def block(student: Tensor, teacher: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        target = sides.sharpen(sides.teacher(teacher))
        return cross_entropy(sides.student(student), target, sides.temperature), weight.to(target.dtype) @ target

    if len(student) <= ROWS:
        return block(student, teacher, weight)
    pieces = [
        checkpoint(block, *piece, use_reentrant=False, preserve_rng_state=False)
        for piece in zip(student.split(ROWS), teacher.split(ROWS), weight.split(ROWS), strict=True)
    ]
    rows, used = zip(*pieces, strict=True)
    return torch.cat(rows), torch.stack(used).sum(dim=0)


def weighted(
    weights: Mapping[str, float], losses: Mapping[str, Tensor], terms: Mapping[str, Term], mask: Mask
) -> Output:
    """What an objective returns: losses times their weights, gauges and sums of what it distilled, its mask's share."""
    gauges = {f"entropy_{name}": term.entropy for name, term in terms.items()}
    gauges["mask_ratio"] = mask.where.to(torch.float32).mean()
    return Output(
        {name: weights[name] * loss for name, loss in losses.items()},
        gauges,
        {name: term.sums for name, term in terms.items()},
    )
