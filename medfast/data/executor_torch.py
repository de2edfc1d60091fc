"""Carry out a plan with our own kernels: one fused pass over a box, or the definition in plain PyTorch without them.

The definition that every other executor is compared with is ``medfast_kernels.reference.augment``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

import medfast_kernels as mk
from medfast_kernels import Key

__all__ = ["TorchExecutor", "gibbs", "ring_and_noise"]


class TorchExecutor:
    """Stored int16 boxes in, views in [0, 1] out: everything of ``intensity``, after the window and resizing.

    size: voxels of a view. window: stored values of 0 and of 1. Stateless, so threads may share it.
    """

    def __init__(self, size: Sequence[int], window: tuple[float, float]):
        self.size, self.window = tuple(size), window

    def __call__(
        self, crops: Sequence[np.ndarray], params: Mapping[str, np.ndarray], key: Key | None = None,
        turns: np.ndarray | None = None,
    ) -> Tensor:  # fmt: skip
        """crops: m int16 boxes (c, d, h, w) of any extent. params: name -> (m,) float32, the same for all channels.
        key: of the noise, one sample and stream for each of the m. turns (m,): bits of ``medfast_kernels.augment`` that
        are left to do. Returns (m, c, *size) fp32."""
        # NumPy asks for huge pages; 16 thousand page faults of 64 MB of PyTorch's own take longer than the views
        views = torch.from_numpy(np.empty((len(crops), len(crops[0]), *self.size), np.float32))
        for place, crop in enumerate(crops):
            numbers: dict[str, Any] = {name: float(value[place]) for name, value in params.items()}
            ringing, noise = numbers.pop("gibbs", 0.0), numbers.pop("noise", 0.0)
            own = one_of(key, place) if noise else None
            at_once = len(crop) == 1 and not ringing  # the noise of channels is one draw, and ringing comes before it
            mk.augment(
                torch.from_numpy(crop), self.size, window=self.window, out=views[place], **numbers,
                turn=None if turns is None else torch.full((len(crop),), int(turns[place])),
                noise=noise if at_once else None, key=own if at_once else None,
            )  # fmt: skip
            ring_and_noise(views[place], ringing, 0.0 if at_once else noise, own)
        return views


def one_of(key: Key | None, place: int) -> Key:
    """The key of one place of a stacked one."""
    if key is None or key.sample is None:
        raise ValueError("noise needs the key of its draw, with a sample for each view")
    stream = key.stream[place : place + 1] if isinstance(key.stream, Tensor) else key.stream
    return key._replace(sample=key.sample[place : place + 1], stream=stream)


def ring_and_noise(view: Tensor, ringing: float, noise: float, key: Key | None) -> None:
    """What comes last, for a view (c, d, h, w), in place. key: of one sample."""
    for channel in view if ringing else ():
        channel.copy_(gibbs(channel, ringing))
    if noise:
        assert key is not None
        drawn = mk.random_normal(tuple(view.shape), key=key, device=view.device)[0]
        view.add_(drawn, alpha=noise).clamp_(0.0, 1.0)


def gibbs(view: Tensor, strength: float) -> Tensor:
    """Ringing of (d, h, w): frequencies further from 0 than (1 - strength) * sqrt(2) / 2 of the longest axis go away.

    The radius is MONAI's GibbsNoise's; the mean of the view always stays. Cut back to [0, 1].
    """
    away: Tensor | float = 0.0
    for axis, n in enumerate(view.shape):  # the spectrum of real numbers: half of the last axis tells the rest
        frequencies = torch.fft.rfftfreq if axis == 2 else torch.fft.fftfreq
        places = (frequencies(n, device=view.device) * n).square()
        away = away + places.view([-1 if i == axis else 1 for i in range(3)])
    radius = (1.0 - strength) * max(view.shape) * 0.5**0.5
    spectrum = torch.fft.rfftn(view) * (away <= radius**2)
    return torch.fft.irfftn(spectrum, s=view.shape).clamp_(0.0, 1.0)
