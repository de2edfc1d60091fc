"""Carry out a plan with PyTorch: the definition that every other executor is compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["TorchExecutor", "gibbs"]


class TorchExecutor:
    """int16 HU boxes in, views in [0, 1] out: window, resize, blur, gain, shift, contrast, gamma.

    size: voxels of a view. window: HU of 0 and of 1. Stateless, so threads may share it.
    """

    def __init__(self, size: Sequence[int], window: tuple[float, float]):
        self.size, self.window = tuple(size), window

    def __call__(self, crops: Sequence[np.ndarray], params: Mapping[str, np.ndarray]) -> Tensor:
        """crops: m int16 boxes, of any extent. params: name -> (m,) float32. Returns (m, 1, *size) fp32."""
        views = torch.empty(len(crops), 1, *self.size)
        for index, crop in enumerate(crops):
            view = self._place(torch.from_numpy(crop))
            views[index, 0] = change(view, {name: float(value[index]) for name, value in params.items()})
        return views

    def _place(self, crop: Tensor) -> Tensor:
        low, high = self.window
        view = crop.float().sub_(low).mul_(1.0 / (high - low)).clamp_(0.0, 1.0)
        if tuple(view.shape) == self.size:
            return view
        return F.interpolate(view[None, None], self.size, mode="trilinear", align_corners=False)[0, 0]


def change(view: Tensor, params: Mapping[str, float]) -> Tensor:
    """Intensity changes of one (d, h, w) view in [0, 1], in the order of ``intensity``, but for those ``ON_HOST``."""
    if params.get("blur", 0.0) > 0.0:
        view = blur(view, params["blur"])
    if "gain" in params or "shift" in params:
        view = (view * params.get("gain", 1.0) + params.get("shift", 0.0)).clamp_(0.0, 1.0)
    if "contrast" in params:
        mean = view.mean()
        view = ((view - mean) * params["contrast"] + mean).clamp_(0.0, 1.0)
    return view ** params["gamma"] if "gamma" in params else view


def blur(view: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of (d, h, w), cut at ceil(3 sigma) voxels, mirrored at the borders without repeating the edge."""
    for n in view.shape:
        view = view.movedim(0, -1) @ _filter(n, sigma).T  # the axis goes to the end: three turns restore the order
    return view.contiguous()


def gibbs(view: Tensor, strength: float) -> Tensor:
    """Ringing of (d, h, w): frequencies further from 0 than (1 - strength) * sqrt(2) / 2 of the longest axis go away.

    The radius is MONAI's GibbsNoise's; the mean of the view always stays. Cut back to [0, 1].
    """
    spectrum = torch.fft.fftn(view)
    axes = [torch.fft.fftfreq(n) * n for n in view.shape]
    away = sum(axis.square().view([-1 if i == j else 1 for j in range(3)]) for i, axis in enumerate(axes))
    radius = (1.0 - strength) * max(view.shape) * 0.5**0.5
    return torch.fft.ifftn(spectrum * (away <= radius**2)).real.clamp_(0.0, 1.0)


def _filter(n: int, sigma: float) -> Tensor:
    """(n, n) fp32: one axis of the blur as a matrix."""
    radius = int(np.ceil(3.0 * sigma))
    offsets = torch.arange(-radius, radius + 1)
    weights = torch.exp(-0.5 * (offsets.double() / sigma) ** 2)
    weights = (weights / weights.sum()).expand(n, -1)
    period = max(2 * (n - 1), 1)
    column = (torch.arange(n)[:, None] + offsets) % period
    column = torch.minimum(column, period - column) if n > 1 else torch.zeros_like(column)
    return torch.zeros(n, n, dtype=torch.float64).scatter_add_(1, column, weights).float()
