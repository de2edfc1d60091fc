"""Views of stored boxes as a Triton operator: placed, blurred where any is, finished. Two launches without a blur."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._augmentation import TRANSPOSED, Augment
from ..key import address, signed
from .registration import operator

_BLOCK = 1024  # voxels of a program; partial sums depend on it and on the view's size alone


def augment(problem: Augment) -> Tensor:
    boxes, size, window, extent, numbers, key, out = problem
    device = boxes.device
    spatial = torch.where((extent[:, 3:] & TRANSPOSED) > 0, extent[:, [0, 2, 1]], extent[:, :3])
    made = _augment(
        boxes, extent.to(device, non_blocking=True), numbers.to(device, non_blocking=True), size, *window,
        bool((spatial != torch.tensor(size)).any()), problem.changes("blur"),
        problem.changes("contrast") or problem.changes("gamma"), None if key is None else address(key, device),
        0 if key is None else signed(key.seed),
    )  # fmt: skip
    return made if out is None else out.copy_(made)


def _launch(
    boxes: Tensor, extent: Tensor, numbers: Tensor, size: list[int], low: float, high: float, resize: bool, blur: bool,
    contrast: bool, counter: Tensor | None, seed: int,
) -> Tensor:  # fmt: skip
    from . import augmentation_kernels as kernels

    out, count = _fake(boxes, extent, numbers, size), math.prod(size)
    programs = -(-count // _BLOCK)
    grid, sums = (len(boxes) * programs,), numbers.new_empty(len(boxes), programs)
    kernels.place[grid](
        boxes, extent, numbers, out, sums, *boxes.stride(), *size, low, 1.0 / (high - low), programs, resize, not blur,
        _BLOCK,
    )  # fmt: skip
    if blur:
        other, strides = torch.empty_like(out), (size[1] * size[2], size[2], 1)
        for axis in (2, 1, 0):
            kernels.blur[grid](out, other, numbers, sums, size[axis], strides[axis], count, programs, axis == 0, _BLOCK)
            out, other = other, out
    if contrast or counter is not None:
        means = sums.sum(1).div_(count)
        kernels.finish[grid](
            out, means, numbers, counter, seed, count, programs, counter is not None, _BLOCK // 4
        )  # fmt: skip
    return out


def _fake(boxes: Tensor, extent: Tensor, numbers: Tensor, size: list[int], *rest) -> Tensor:
    return numbers.new_empty((boxes.shape[0], *size))


_augment = operator(
    "augment_triton",
    "(Tensor boxes, Tensor extent, Tensor numbers, SymInt[] size, float low, float high, bool resize, bool blur, "
    "bool contrast, Tensor? address, int seed) -> Tensor",
    _launch,
    _fake,
)
