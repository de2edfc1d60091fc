"""Arguments of ``augment``, checked once for all backends."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._checks import check_device, check_key
from .key import Key

Number = float | Tensor | None
NEUTRAL = {"blur": 0.0, "gain": 1.0, "shift": 0.0, "contrast": 1.0, "gamma": 1.0, "noise": 0.0}  # order of the columns
LEAST = {"blur": 0.0, "gain": 0.0, "shift": -1e30, "contrast": 0.0, "gamma": 1e-3, "noise": 0.0}
TRANSPOSED, MIRRORED = 1, (2, 4, 8)  # bits of a turn


class Augment(NamedTuple):
    """One checked call. extent (m, 4) int64: voxels of each box that count, and its turn. numbers (m, 6) fp32, columns
    of NEUTRAL. Both on the CPU. key: None without noise."""

    boxes: Tensor
    size: tuple[int, int, int]
    window: tuple[float, float]
    extent: Tensor
    numbers: Tensor
    key: Key | None
    out: Tensor | None

    def given(self, name: str) -> Tensor:
        """(m,): one of the numbers."""
        return self.numbers[:, list(NEUTRAL).index(name)]

    def changes(self, name: str) -> bool:
        """Whether one of the numbers does anything to any view."""
        return bool((self.given(name) != NEUTRAL[name]).any())


def check(
    boxes: Tensor, size: Sequence[int], window: Sequence[float], extent: Tensor | None, turn: Tensor | None,
    numbers: Mapping[str, Number], key: Key | None, out: Tensor | None,
) -> Augment:  # fmt: skip
    if not isinstance(boxes, Tensor) or boxes.dtype != torch.int16:
        raise TypeError(f"boxes must be an int16 tensor, got {getattr(boxes, 'dtype', type(boxes).__name__)}")
    if boxes.dim() != 4 or not boxes.numel():
        raise ValueError(f"boxes must be (m, d, h, w), none of them 0, got {tuple(boxes.shape)}")
    size = tuple(int(n) for n in size)
    if len(size) != 3 or min(size) < 1:
        raise ValueError(f"size must be three numbers of voxels, got {size}")
    if len(window) != 2 or not -math.inf < window[0] < window[1] < math.inf:
        raise ValueError(f"window must be (low, high) with low < high, got {tuple(window)}")
    count = len(boxes)
    columns = [_number(name, numbers[name], count) for name in NEUTRAL]
    key = _key(key, count) if any(columns[-1]) else None
    if out is not None:
        _check_out(out, boxes, size)
    places = [*zip(*_extent(extent, boxes), strict=True), _turn(turn, count, size)]
    return Augment(boxes, size, (float(window[0]), float(window[1])), torch.tensor(places).T.contiguous(),
                   torch.tensor(columns).T.contiguous(), key, out)  # fmt: skip


def _number(name: str, value: Number, count: int) -> list[float]:
    if isinstance(value, Tensor):
        if value.device.type != "cpu" or value.dim() > 1 or value.dim() == 1 and len(value) != count:
            raise ValueError(f"{name} must be one number, or (m,) = ({count},) on the CPU, where it was drawn, got "
                             f"{tuple(value.shape)} on {value.device}")  # fmt: skip
        given = value.float().expand(count).tolist()
    else:
        given = [NEUTRAL[name] if value is None else float(value)] * count
    if not all(LEAST[name] <= x < math.inf for x in given):
        raise ValueError(f"{name} must be finite and at least {LEAST[name]}, got {given}")
    return given


def _key(key: Key | None, count: int) -> Key:
    if key is None:
        raise ValueError("noise needs key, a medfast_kernels.Key with one sample for each view; got None")
    sample = check_key(key)
    if len(sample) != count:
        raise ValueError(f"key.sample must be (m,) = ({count},), got {tuple(sample.shape)}")
    return key


def _extent(extent: Tensor | None, boxes: Tensor) -> list[list[int]]:
    most = list(boxes.shape[1:])
    if extent is None:
        return [most] * len(boxes)
    _whole("extent", extent, (len(boxes), 3))
    given = extent.tolist()
    if not all(1 <= n <= limit for row in given for n, limit in zip(row, most, strict=True)):
        raise ValueError(f"extent must be within the boxes, 1 to {most}, got {given}")
    return given


def _turn(turn: Tensor | None, count: int, size: tuple[int, ...]) -> list[int]:
    if turn is None:
        return [0] * count
    _whole("turn", turn, (count,))
    given = turn.tolist()
    if not all(0 <= bits < 16 for bits in given):
        raise ValueError(f"turn must be bits in [0, 16), got {given}")
    if size[1] != size[2] and any(bits & TRANSPOSED for bits in given):
        raise ValueError(f"turn exchanges the last two axes, but the view has {size[1]} and {size[2]} voxels there")
    return given


def _whole(name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    if not isinstance(value, Tensor) or value.dtype != torch.int64:
        raise TypeError(f"{name} must be an int64 tensor, got {getattr(value, 'dtype', type(value).__name__)}")
    if tuple(value.shape) != shape or value.device.type != "cpu":
        raise ValueError(f"{name} must be {shape} on the CPU, got {tuple(value.shape)} on {value.device}")


def _check_out(out: Tensor, boxes: Tensor, size: tuple[int, ...]) -> None:
    if not isinstance(out, Tensor) or out.dtype != torch.float32:
        raise TypeError(f"out must be an fp32 tensor, got {getattr(out, 'dtype', type(out).__name__)}")
    check_device("out", out, boxes, "boxes")
    if tuple(out.shape) != (len(boxes), *size) or not out.is_contiguous():
        raise ValueError(f"out must be contiguous, {(len(boxes), *size)}, got {tuple(out.shape)}")
