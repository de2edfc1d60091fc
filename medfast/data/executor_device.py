"""Carry out a plan where the model is: boxes travel as int16, a quarter of what views weigh with their margins, and our
kernels (Triton, or the definition) make fp32 views of them there, on a stream of their own beside the model's.

Shapes are fixed: every box is packed into one of the largest extent that the plan may ask for, so memory is bounded and
allocations repeat.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

import medfast_kernels as mk
from medfast.types import Batch
from medfast_kernels import Key

from .executor_torch import one_of, ring_and_noise

__all__ = ["DeviceExecutor", "beside", "device_of", "hand_over"]

_streams = threading.local()


class DeviceExecutor:
    """The same call as ``TorchExecutor``; views on ``device``. Holds a buffer, pinned for a GPU: one for each thread.

    most: largest number of views of one call. extent: the largest box, (d, h, w). Call inside ``beside(device)``.
    """

    def __init__(
        self, size: Sequence[int], window: tuple[float, float], device: torch.device, *, most: int,
        extent: Sequence[int], channels: int = 1,
    ):  # fmt: skip
        self.size, self.window, self.device = tuple(size), window, device
        self.packed = torch.zeros(most * channels, *extent, dtype=torch.int16, pin_memory=device.type == "cuda")

    def __call__(
        self, crops: Sequence[np.ndarray], params: Mapping[str, np.ndarray], key: Key | None = None,
        turns: np.ndarray | None = None,
    ) -> Tensor:  # fmt: skip
        """(m, c, *size) fp32; arguments as ``TorchExecutor`` has them."""
        channels = len(crops[0])
        numbers = {name: torch.from_numpy(np.repeat(value, channels)) for name, value in params.items()}
        ringing, noise = (params.get(name, np.zeros(len(crops))) for name in ("gibbs", "noise"))
        numbers.pop("gibbs", None)
        later = (ringing > 0) | (channels > 1)  # ringing comes before noise; that of channels is one draw
        if "noise" in numbers:
            numbers["noise"] = torch.from_numpy(np.repeat(np.where(later, 0.0, noise), channels))
        boxes, extent = self._pack(crops)
        fused = bool((~later & (noise > 0)).any())
        views = mk.augment(
            boxes.to(self.device, non_blocking=True), self.size, window=self.window, extent=extent, **numbers,
            turn=None if turns is None else torch.from_numpy(np.repeat(turns, channels)), key=key if fused else None,
        ).unflatten(0, (len(crops), channels))  # fmt: skip
        for place in map(int, np.flatnonzero((ringing > 0) | later & (noise > 0))):
            own = one_of(key, place) if noise[place] else None
            ring_and_noise(views[place], float(ringing[place]), float(noise[place]), own)
        return views

    def _pack(self, crops: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        """The boxes in one tensor, (m * c, *extent), and the voxels of each that count, (m * c, 3)."""
        voxels = [channel for crop in crops for channel in crop]
        for place, box in enumerate(voxels):
            self.packed[place][tuple(slice(n) for n in box.shape)] = torch.from_numpy(box)
        return self.packed[: len(voxels)], torch.tensor([box.shape for box in voxels])


def device_of(name: str) -> torch.device:
    """Of data.device, for the calling thread: each rank has its own current GPU. ValueError for what is not there."""
    if name not in ("cpu", "cuda"):
        raise ValueError(f"data.device is cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("data.device is cuda, but PyTorch sees no GPU here; set data.device=cpu")
    return torch.device("cuda", torch.cuda.current_device()) if name == "cuda" else torch.device("cpu")


@contextmanager
def beside(device: torch.device) -> Iterator[None]:
    """GPU work of the block runs on this thread's own stream and is done when the block ends; so the buffers that it
    read may be filled again. Only this thread waits. Nothing on a CPU."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        if not hasattr(_streams, "own"):
            _streams.own = torch.cuda.Stream()
        with torch.cuda.stream(_streams.own):
            yield
        _streams.own.synchronize()


def hand_over(batch: Batch) -> Batch:
    """``batch``, whose memory is not given away again before the caller's stream has done with it."""
    tensors = [*batch.views, *batch.valid, *(x for per_view in batch.targets.values() for x in per_view)]
    for tensor in tensors:
        if tensor is not None and tensor.device.type == "cuda":
            tensor.record_stream(torch.cuda.current_stream(tensor.device))
    return batch
