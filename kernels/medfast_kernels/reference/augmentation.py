"""Views of stored boxes in plain PyTorch: the definition that every other backend is held to."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .._augmentation import MIRRORED, NEUTRAL, TRANSPOSED, Augment, Number, check
from .._checks import no_autocast
from ..key import Key
from .random import random_normal


def augment(
    boxes: Tensor, size: Sequence[int], *, window: Sequence[float], extent: Tensor | None = None,
    turn: Tensor | None = None, blur: Number = None, gain: Number = None, shift: Number = None, contrast: Number = None,
    gamma: Number = None, noise: Number = None, key: Key | None = None, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``medfast_kernels.augment`` in plain PyTorch, whatever backend is asked for."""
    numbers = {"blur": blur, "gain": gain, "shift": shift, "contrast": contrast, "gamma": gamma, "noise": noise}
    return run(check(boxes, size, window, extent, turn, numbers, key, out))


def run(problem: Augment) -> Tensor:
    out = problem.out
    if out is None:
        out = torch.empty(len(problem.boxes), *problem.size, device=problem.boxes.device)
    noise = None
    if problem.key is not None:
        noise = random_normal(problem.size, key=problem.key, device=out.device)
    with no_autocast(out.device):
        for i, numbers in enumerate(problem.numbers.tolist()):
            view = change(_placed(problem, i), **dict(zip(NEUTRAL, numbers, strict=True)))
            if noise is not None and numbers[-1]:
                view = (view + numbers[-1] * noise[i]).clamp_(0.0, 1.0)
            out[i] = view
    return out


def _placed(problem: Augment, i: int) -> Tensor:
    """Window, turn, resize."""
    (*extent, turn), (low, high) = problem.extent[i].tolist(), problem.window
    box = problem.boxes[i][tuple(slice(n) for n in extent)]
    if turn & TRANSPOSED:
        box = box.transpose(1, 2)
    box = box.flip([axis for axis, bit in enumerate(MIRRORED) if turn & bit])
    view = ((box.float() - low) * (1.0 / (high - low))).clamp_(0.0, 1.0)
    if tuple(view.shape) == problem.size:
        return view
    return F.interpolate(view[None, None], problem.size, mode="trilinear", align_corners=False)[0, 0]


def change(
    view: Tensor, blur: float = 0.0, gain: float = 1.0, shift: float = 0.0, contrast: float = 1.0, gamma: float = 1.0,
    noise: float = 0.0,
) -> Tensor:  # fmt: skip
    """A (d, h, w) view in [0, 1], all but its noise, which is another's."""
    if blur > 0.0:
        for n in view.shape:  # the axis goes to the end: three turns restore the order
            view = view.movedim(0, -1) @ _filter(n, blur, view.device).T
    if gain != 1.0 or shift != 0.0:
        view = (view * gain + shift).clamp_(0.0, 1.0)
    if contrast != 1.0:
        mean = view.mean()
        view = ((view - mean) * contrast + mean).clamp_(0.0, 1.0)
    return view**gamma if gamma != 1.0 else view


def _filter(n: int, sigma: float, device: torch.device) -> Tensor:
    """(n, n) fp32: one axis of the blur as a matrix."""
    radius = math.ceil(3.0 * sigma)
    offsets = torch.arange(-radius, radius + 1)
    weights = torch.exp(-0.5 * (offsets.double() / sigma) ** 2)
    weights = (weights / weights.sum()).expand(n, -1)
    period = max(2 * (n - 1), 1)
    column = (torch.arange(n)[:, None] + offsets).abs() % period
    column = torch.minimum(column, period - column) if n > 1 else torch.zeros_like(column)
    return torch.zeros(n, n, dtype=torch.float64).scatter_add_(1, column, weights).float().to(device)
