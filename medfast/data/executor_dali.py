"""Carry out a plan with NVIDIA DALI: one graph for CPU and GPU, fed with boxes and numbers, no random operators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from .intensity import ON_HOST

__all__ = ["DaliExecutor", "build", "require"]


def require():
    """DALI's ``fn``, ``types``, ``math`` and ``Pipeline``. ValueError with what to do where DALI is not installed."""
    try:
        from nvidia.dali import Pipeline, fn, math, types
    except ImportError as error:
        raise ValueError(
            "data.executor is 'dali', but NVIDIA DALI cannot be imported. Install medfast[dali-cu13] "
            "(medfast[dali-cu12] for older drivers), or set data.executor=torch, which gives the same views."
        ) from error
    return fn, types, math, Pipeline


def build(device: str, size: Sequence[int], window: tuple[float, float], zoom: bool, names: Sequence[str]):
    """Graph of one view: an int16 box (d, h, w, 1) to fp32 (*size, 1) in [0, 1]. Call inside a pipeline definition.

    device: "cpu" or "gpu". zoom: boxes may have another extent than ``size``. names: the intensity changes present,
    each an input of one number per sample; blur has a second input, its window in voxels.
    """
    fn, types, math, _ = require()
    low, high = window
    numbers = {name: fn.external_source(name=name, device="cpu", ndim=0) for name in names if name not in ON_HOST}
    view = fn.external_source(name="box", device=device, layout="DHWC", dtype=types.INT16)
    view = fn.cast(view, dtype=types.FLOAT)
    view = math.clamp((view - low) * (1.0 / (high - low)), 0.0, 1.0)
    if zoom:
        view = fn.resize(view, size=list(size), interp_type=types.INTERP_LINEAR, antialias=False)
    if "blur" in numbers:
        width = fn.external_source(name="blur_window", device="cpu", ndim=0)
        view = fn.gaussian_blur(view, sigma=numbers["blur"], window_size=width)
    if "gain" in numbers or "shift" in numbers:
        view = math.clamp(view * numbers.get("gain", 1.0) + numbers.get("shift", 0.0), 0.0, 1.0)
    if "contrast" in numbers:
        mean = fn.reductions.mean(view)
        view = math.clamp((view - mean) * numbers["contrast"] + mean, 0.0, 1.0)
    return view ** numbers["gamma"] if "gamma" in numbers else view


class DaliExecutor:
    """The same call as ``TorchExecutor``, on DALI's CPU backend. Holds a pipeline: one executor per thread.

    most: largest number of views of one call. ValueError where DALI is missing.
    """

    def __init__(
        self, size: Sequence[int], window: tuple[float, float], *, zoom: bool, names: Sequence[str], most: int
    ):
        *_, pipeline = require()
        self.size, self.names = tuple(size), [name for name in names if name not in ON_HOST]
        self.pipeline = pipeline(batch_size=most, num_threads=1, device_id=None, prefetch_queue_depth=1,
                                 exec_async=False, exec_pipelined=False)  # fmt: skip
        with self.pipeline:
            self.pipeline.set_outputs(build("cpu", self.size, window, zoom, self.names))
        self.pipeline.build()

    def __call__(self, crops: Sequence[np.ndarray], params: Mapping[str, np.ndarray]) -> Tensor:
        """crops: m int16 boxes. params: name -> (m,) float32. Returns (m, 1, *size) fp32."""
        self.pipeline.feed_input("box", [crop[..., None] for crop in crops], layout="DHWC")
        for name in self.names:
            value = np.asarray(params[name], dtype=np.float32)
            if name == "blur":  # a window of one voxel is the identity; sigma itself must stay above zero
                width = np.where(value > 0, 2 * np.ceil(3 * value) + 1, 1).astype(np.int32)
                self.pipeline.feed_input("blur_window", [np.array(x) for x in width])
                value = np.where(value > 0, value, np.float32(1))
            self.pipeline.feed_input(name, [np.array(x) for x in value])
        (views,) = self.pipeline.run()
        stacked = torch.from_numpy(np.array(views.as_tensor(), copy=True))
        return stacked.reshape(len(crops), 1, *self.size)
