"""Arguments of the token-wise contrast, checked once for all backends, and what follows from them."""

from __future__ import annotations

import math
import os
from typing import NamedTuple

import torch
from torch import Tensor

from ._checks import check_device, floating, kind, one_of, reads_values, wide

WEIGHT_MODES = ("exp", "logit")


class Problem(NamedTuple):
    """One checked call.

    z: (2, volumes, positions, dim) as given. Token ``(view * volumes + volume) * positions + position`` is a row of it.
    volume: (volumes,) int64 ids, on the device of z, or None where all differ. first, count: the volumes that are
    anchors. The logit of a weighted pair, same position and another volume, is ``factor * s + offset`` in place of s.
    """

    z: Tensor
    temperature: float
    factor: float
    offset: float
    volume: Tensor | None
    first: int
    count: int

    @property
    def anchors(self) -> int:
        """Tokens whose loss is averaged, of both views."""
        return 2 * self.count * self.z.shape[2]

    @property
    def dtype(self) -> torch.dtype:
        """Of the computation and of the loss."""
        return wide(self.z.dtype)


def check(
    z: Tensor,
    *,
    temperature: float,
    weight: float,
    weight_mode: str,
    volume: Tensor | None,
    anchors: tuple[int, int] | None,
) -> Problem:
    """Refuse what no backend could mean; with MEDFAST_CHECK=1 also rows of z that are not of length 1."""
    if not isinstance(z, Tensor):
        raise TypeError(f"z must be a tensor, got {type(z).__name__}")
    if not floating(z):
        raise TypeError(f"z must be a floating tensor, got {kind(z)}")
    if z.dim() != 4 or z.shape[0] != 2:
        raise ValueError(f"z must be (2 views, volumes, positions, dim), got {tuple(z.shape)}; "
                         "for SimCLR's (2, batch, dim) it is z.unsqueeze(2)")  # fmt: skip
    if 0 in z.shape:
        raise ValueError(f"z needs at least one volume, position and channel, got {tuple(z.shape)}")
    temperature, weight = _number("temperature", temperature), _number("weight", weight)
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be finite and above 0, got {temperature}")
    if not 0 <= weight < math.inf:
        raise ValueError(f"weight must be finite and at least 0, got {weight} (1 is neutral in exp, 0 in logit)")
    one_of("weight_mode", weight_mode, WEIGHT_MODES)
    logit = weight_mode == "logit"
    offset = 0.0 if logit else math.log(weight) if weight else -math.inf
    if os.environ.get("MEDFAST_CHECK") == "1":
        z = _normalised(z)
    return Problem(
        z, temperature, 1 + weight if logit else 1.0, offset, _volume_ids(volume, z), *_anchors(anchors, z.shape[1])
    )


def _number(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    return float(value)


def _volume_ids(volume: Tensor | None, z: Tensor) -> Tensor | None:
    if volume is None:
        return None
    if not isinstance(volume, Tensor) or volume.dtype not in (torch.int32, torch.int64):
        got = getattr(volume, "dtype", type(volume).__name__)
        raise TypeError(f"volume must be None or a (volumes,) tensor of integer ids, int64 or int32, got {got}")
    if tuple(volume.shape) != (z.shape[1],):
        raise ValueError(f"volume must be (volumes,) = ({z.shape[1]},), got {tuple(volume.shape)}")
    check_device("volume", volume, z, "z")
    return volume.long()


def _anchors(anchors: tuple[int, int] | None, volumes: int) -> tuple[int, int]:
    if anchors is None:
        return 0, volumes
    pair = tuple(anchors) if isinstance(anchors, (tuple, list)) else ()
    if len(pair) != 2 or not all(isinstance(value, int) and not isinstance(value, bool) for value in pair):
        raise TypeError(f"anchors must be None or two ints, (first volume, count), got {anchors!r}")
    first, count = pair
    if first < 0 or count < 1 or first + count > volumes:
        raise ValueError(f"anchors (first, count) must lie within the {volumes} volumes, got {anchors}")
    return first, count


@reads_values("normalised(Tensor z) -> Tensor")
def _normalised(z: Tensor) -> None:
    length = torch.linalg.vector_norm(z.detach().to(wide(z.dtype)), dim=-1)
    off = (length - 1).abs().nan_to_num(nan=math.inf)
    if off.max() > (1e-2 if torch.finfo(z.dtype).bits == 16 else 1e-3):
        at = tuple((off == off.max()).nonzero()[0].tolist())
        raise ValueError(f"z must be L2-normalised along its last axis: z[{', '.join(map(str, at))}] has length "
                         f"{length[at].item():.6g}; torch.nn.functional.normalize(z, dim=-1) does it")  # fmt: skip
