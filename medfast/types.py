"""What crosses floors, and nothing else.

Axes, everywhere: b batch, c channels, d h w voxels, ``*cells`` mask cells, ``*grid`` tokens, n tokens in raster order.
Volumes are (b, c, d, h, w), or (b, c, h, w) in 2D. Feature maps are channels-last, (b, *grid, c).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from medfast_kernels import Key

__all__ = [
    "Backbone", "Batch", "DropsTokens", "EncodesPairs", "Features", "Gather", "Key", "Mask", "Masker", "Network",
    "Objective", "Output", "Teacher", "alone",
]  # fmt: skip

# Rows (b, ...) of this rank -> the rows of all ranks in order of rank, with gradient, and how many come before its own.
Gather = Callable[[Tensor], tuple[Tensor, int]]


def alone(rows: Tensor) -> tuple[Tensor, int]:
    """``Gather`` of a rank that is the only one."""
    return rows, 0


@dataclass(frozen=True)
class Batch:
    """The micro-batch an objective sees.

    views: tuple of (b, c, *size) float volumes in [0, 1]; sizes may differ. boxes: (b, views, 2 * dims) float32, start
    then stop of each view in stored voxels, and None for batches that no store was cut for. key: the step's key;
    ``key.sample`` holds the global slot of every sample. valid: per view (b, *size) bool, False where the view is
    padding, or None where nothing was padded. params: what the plan did, (b, views) each, and "volume" (b,).
    targets: name -> one tensor per view, what an objective is given and is no view ("mask": (b, *cells) bool).
    """

    views: tuple[Tensor, ...]
    boxes: Tensor | None
    key: Key
    valid: tuple[Tensor | None, ...] = ()
    params: Mapping[str, Tensor] = field(default_factory=dict)
    targets: Mapping[str, tuple[Tensor, ...]] = field(default_factory=dict)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Batch:
        """The batch on ``device``; floating views and targets cast to ``dtype`` where given."""

        def move(x: Tensor) -> Tensor:
            return x.to(device, dtype if x.is_floating_point() else None, non_blocking=True)

        sample = self.key.sample
        return Batch(
            views=tuple(move(x) for x in self.views),
            boxes=None if self.boxes is None else self.boxes.to(device),
            key=self.key._replace(sample=None if sample is None else sample.to(device)),
            valid=tuple(None if x is None else move(x) for x in self.valid),
            params={name: value.to(device) for name, value in self.params.items()},
            targets={name: tuple(move(x) for x in per_view) for name, per_view in self.targets.items()},
        )


@dataclass(frozen=True)
class Mask:
    """Which cells of a volume are hidden.

    where: (b, *cells) bool, True = hidden. A cell covers k whole tokens per axis, ceil(tokens / k) cells, the last one
    cut; the backbone up-samples by repeating and cropping. hidden, visible: (b, count) ascending int64 ids of cells in
    raster order; None where counts differ between samples.
    """

    where: Tensor
    hidden: Tensor | None = None
    visible: Tensor | None = None


@dataclass(frozen=True)
class Features:
    """What a backbone makes of a volume.

    stages: channels-last maps (b, *grid, c), fine to coarse, after each merge. summary: (b, c), [CLS] where there is
    one, else the mean of the last stage. attention: (b, n) [CLS]-to-token or None. extra: what only some have: "taps"
    (the five maps a U-Net reads), "decoder", "dim".
    """

    stages: tuple[Tensor, ...]
    summary: Tensor
    attention: Tensor | None = None
    extra: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Output:
    """What an objective says of a micro-batch.

    losses: named, weighted fp32 scalars whose sum is trained. gauges: named detached scalars that are only watched.
    sums: name -> (sum, count); training adds them over micro-batches and ranks and hands them to ``absorb``.
    """

    losses: dict[str, Tensor]
    gauges: dict[str, Tensor] = field(default_factory=dict)
    sums: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


@runtime_checkable
class Backbone(Protocol):
    """Encoder. channels, strides: of each entry of ``Features.stages``, strides in voxels.

    in_channels: of the volume. embed: width of the embedding, and so of ``fill``; 0 where there are no tokens to hide
    and masks are refused (ResNet). semantic_attention: number, from 1, of the stage whose tokens [CLS] attends to,
    which ``Features.attention`` tells of; None where there is no [CLS].
    """

    channels: tuple[int, ...]
    strides: tuple[int, ...]
    in_channels: int
    embed: int
    semantic_attention: int | None

    def __call__(
        self, volume: Tensor, mask: Mask | None = None, fill: Tensor | None = None, key: Key | None = None
    ) -> Features:
        """volume: (b, c, *size). fill: the mask token, (embedding width,). No key: no drop path, no dropout."""
        ...


@runtime_checkable
class DropsTokens(Backbone, Protocol):
    """A backbone that can leave hidden tokens out (ViT)."""

    def encode_visible(self, volume: Tensor, mask: Mask, key: Key | None = None) -> Tensor:
        """(b, visible [+ 1 for CLS], dim)."""
        ...


@runtime_checkable
class EncodesPairs(Backbone, Protocol):
    """A backbone in which two views meet after the embedding (SwinFUSE)."""

    def encode_pair(self, a: Tensor, b: Tensor, key: Key | None = None) -> tuple[Features, Features]: ...


@runtime_checkable
class Network(Protocol):
    """Segmentation net around an encoder.

    ``features(...).extra["decoder"]`` is the decoder's map before the head: of the volume's size, or, for networks with
    a ``decoder_stride`` (nnFormer, DAE-Former), on the grid of the encoder's first tokens.
    """

    encoder: Backbone

    def __call__(self, volume: Tensor) -> Tensor: ...

    def features(
        self, volume: Tensor, mask: Mask | None = None, fill: Tensor | None = None, key: Key | None = None
    ) -> Features: ...


class Masker(Protocol):
    """Draws a mask from the batch's key, inside forward. ``key`` must be a stacked or plain key with ``sample``."""

    def __call__(self, cells: tuple[int, ...], key: Key, attention: Tensor | None = None) -> Mask: ...


class Teacher:
    """fp32 EMA of parts of an objective: never trained, never in the module tree, never stored in less than fp32.

    ``Teacher(objective, "backbone", "trunk", "fill")`` copies those attributes (modules or parameters) and offers them
    under the same names; canonical parameter names are therefore the student's. Being no ``nn.Module`` keeps it out of
    every engine's casts, partitions and checkpoints. fp64 students keep fp64 teachers.
    """

    def __init__(self, objective: nn.Module, *parts: str):
        self.parts = parts
        self._tree = nn.Module()
        for part in parts:
            setattr(self._tree, part, copy.deepcopy(getattr(objective, part)))
        self._tree.requires_grad_(False).eval()

    def __getattr__(self, name: str):
        if name in ("_tree", "parts"):
            raise AttributeError(name)
        return getattr(self._tree, name)

    def state(self) -> dict[str, Tensor]:
        """Parameters and buffers by canonical name; the tensors themselves, not copies."""
        return {**dict(self._tree.named_parameters()), **dict(self._tree.named_buffers())}

    def to(self, *args, **kwargs) -> Teacher:
        self._tree.to(*args, **kwargs)
        return self

    @torch.no_grad()
    def copy_(self, source: Mapping[str, Tensor]) -> None:
        """Become ``source`` (canonical name -> tensor). Names missing from it: KeyError, and nothing is changed."""
        state = self.state()
        missing = sorted(set(state) - set(source))
        if missing:
            raise KeyError(f"the teacher needs {len(missing)} tensors that are not there, the first is {missing[0]!r}")
        for name, tensor in state.items():
            tensor.copy_(source[name])

    @torch.no_grad()
    def update(self, student: Mapping[str, Tensor], momentum: float) -> None:
        """teacher <- momentum * teacher + (1 - momentum) * student; buffers are copied."""
        mine = dict(self._tree.named_parameters())
        theirs = [student[name].to(parameter.dtype) for name, parameter in mine.items()]
        torch._foreach_lerp_(list(mine.values()), theirs, 1.0 - momentum)
        for name, buffer in self._tree.named_buffers():
            buffer.copy_(student[name])


class Objective(nn.Module):
    """A pretext task. ``forward`` communicates with nobody but through ``gather`` and draws from ``batch.key`` alone.

    views: how many views of a volume it wants. needs: names it reads from ``Batch.params`` or ``Batch.targets``.
    teacher: updated by training, once per optimizer step, with ``momentum(t)``. t in [0, 1) is the only clock: it is
    step / steps of the whole run, a 0-dim tensor in forward and a float in ``momentum``. group: samples, consecutive
    global slots, that are contrasted with each other or share batch statistics; training refuses to start where all
    ranks' micro-batches together are no multiple of it, and sets gather.
    """

    views: int = 1
    needs: frozenset[str] = frozenset()
    teacher: Teacher | None = None
    group: int = 1
    gather: Gather = staticmethod(alone)

    def forward(self, batch: Batch, t: Tensor) -> Output:
        raise NotImplementedError

    def momentum(self, t: float) -> float:
        """EMA momentum of the teacher at time t."""
        raise NotImplementedError(f"{type(self).__name__} has no teacher")

    def absorb(self, sums: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Take ``Output.sums``, added over micro-batches and ranks, once per optimizer step (centres)."""

    def cells(self, size: tuple[int, ...]) -> tuple[int, ...] | None:
        """Mask cells per axis of a view of ``size`` voxels, or None where it takes no masks."""
        return None

    def ahead(self, size: tuple[int, ...]) -> Mapping[str, Callable[[Key], Tensor]]:
        """Targets for views of ``size`` that the data pipeline makes on the host, ahead of time, because how long they
        take only their draw knows: name -> function of the batch's key, stacked over the views, to (views * b, ...)."""
        return {}

    def encode(self, batch: Batch) -> Sequence[Features]:
        """For gauges: what the encoder makes of each view, whole and without drop path; [] where that means nothing."""
        backbone = getattr(self, "backbone", None)
        return [backbone(view) for view in batch.views] if isinstance(backbone, Backbone) else []

    def picture(self, batch: Batch) -> dict[str, tuple[Tensor, ...]]:
        """For reports: what there is of "reconstruction", "mask", "drop", "attention", one tensor per view, no grad."""
        return {}

    def tokens(self, batch: Batch, t: float = 0.0) -> dict[str, Tensor]:
        """For collapse gauges: what there is of "student", "teacher" (tokens, dim), "prototypes" (rows, K) and "crops"
        (rows,), from 0 on the view of a sample that each row of prototypes is a part of; no grad."""
        return {}
