"""The two ways in which prototypes are distilled: one vector per view across views, and hidden tokens of one view."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from medfast.objectives.losses import cross_entropy, entropy, mean_of_means
from medfast.objectives.masking import hidden_tokens
from medfast.types import Mask

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
    target = sides.sharpen(sides.teacher(chosen))
    rows = cross_entropy(sides.student(student), target, sides.temperature)
    # the last layer is linear without bias: the sum of all logits is the logits of the sum
    total = sides.teacher(teacher.sum(dim=(0, 1)))
    return Term(mean_of_means(rows, weight), (total, total.new_full((), teacher[..., 0].numel())), entropy(target))
