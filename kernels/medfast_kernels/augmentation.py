"""Views of stored boxes: window, quarter turns and mirrors, resizing, blur, brightness, contrast, gamma, noise at once.

What a data pipeline does between a store and a network, with all its numbers drawn before (by the host, from a key):
the same numbers give the same views on every device.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ._augmentation import Number, check
from ._cpp import augmentation as cpp
from ._dispatch import choose
from ._triton import augmentation as triton
from .key import Key
from .reference import augmentation as reference


def augment(
    boxes: Tensor, size: Sequence[int], *, window: Sequence[float], extent: Tensor | None = None,
    turn: Tensor | None = None, blur: Number = None, gain: Number = None, shift: Number = None, contrast: Number = None,
    gamma: Number = None, noise: Number = None, key: Key | None = None, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """(m, *size) fp32 views in [0, 1] of ``boxes`` (m, d, h, w) int16, any strides. In this order:

    window   (value - window[0]) / (window[1] - window[0]), cut to [0, 1].
    turn     (m,) bits: 1 exchanges the last two axes, then 2, 4 and 8 mirror the first, second and third.
    resize   of the first ``extent`` (m, 3) voxels of each box, all where None, to ``size``: linear between the centres
             of voxels, constant beyond the outermost (``interpolate`` with align_corners=False).
    blur     standard deviation of a Gaussian in voxels of the view, cut at its triple, mirrored at the borders without
             repeating them.
    gain, shift   x * gain + shift, cut to [0, 1].
    contrast      (x - mean) * contrast + mean, about the view's mean, cut to [0, 1].
    gamma         x ** gamma.
    noise         x + noise * n, cut to [0, 1]; n as ``random_normal(size, key=key)`` has it, key.sample (m,).

    extent, turn and the numbers, one or (m,) each, are what the host drew: tensors on the CPU, wherever boxes are.
    out: where to put the views. No gradient. Raises ValueError for what does not fit or is out of range, TypeError for
    other kinds.
    """
    numbers = {"blur": blur, "gain": gain, "shift": shift, "contrast": contrast, "gamma": gamma, "noise": noise}
    problem = check(boxes, size, window, extent, turn, numbers, key, out)
    run = {"reference": reference.run, "cpp": cpp.augment, "triton": triton.augment}
    return run[choose("augment", boxes.device)](problem)
