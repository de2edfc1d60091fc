"""Checks that more than one operator makes of its arguments."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TypeGuard, TypeVar

import torch
from torch import Tensor

from .key import Key

NAMESPACE = (__package__ or "medfast_kernels").replace(".", "_")  # of torch.ops: a vendored copy gets its own
TRACED = hasattr(torch.library, "custom_op")  # torch 2.4: before it, no graph holds an operator that Python defines
INTEGER = (int, *([torch.SymInt] if hasattr(torch, "SymInt") else []))  # a compiled graph's sizes are SymInt
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
Share = TypeVar("Share", bound="float | Tensor | None")


def one_of(name: str, value: str, accepted: Sequence[str]) -> None:
    if value not in accepted:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, accepted))}, got {value!r}")


def number(name: str, value: object) -> None:
    """Refuse what is no finite number; True and False are none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a float or an int, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")


def switch(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def floating(x: object) -> TypeGuard[Tensor]:
    """Whether it is a tensor of numbers that operators compute with: of 16, 32 or 64 bits, and not sparse."""
    return isinstance(x, Tensor) and x.dtype in FLOATING and x.layout is torch.strided


def kind(x: object) -> str:
    """What it is, for errors."""
    if not isinstance(x, Tensor):
        return type(x).__name__
    return str(x.dtype) if x.layout is torch.strided else f"{x.dtype}, {x.layout}"


def wide(dtype: torch.dtype) -> torch.dtype:
    """What is computed in: fp32 for 16 bits."""
    return torch.promote_types(dtype, torch.float32)


def check_beside(name: str, value: Tensor, shape: tuple[int, ...], x: Tensor, of: str) -> None:
    """Refuse a floating tensor that does not go with ``x``, which is the argument ``of``."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if not floating(value):
        raise TypeError(f"{name} must be a floating tensor, got {kind(value)}")
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")
    check_device(name, value, x, of)
    if wide(value.dtype) != wide(x.dtype):
        raise ValueError(
            f"{name} must be {x.dtype} as {of} is, or fp32 where {of} has 16 bits, or 16 bits where {of} is fp32; "
            f"got {value.dtype}"
        )


def no_autocast(device: torch.device) -> AbstractContextManager:
    """As it is without autocast, which the meta device does not know."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def check_device(name: str, value: Tensor, x: Tensor, of: str) -> None:
    if value.device != x.device:
        raise ValueError(f"{name} must be on the device of {of}, {x.device}, got {value.device}")


def check_key(key: Key) -> Tensor:
    """The samples that ``key`` addresses; what addresses none is refused."""
    if not isinstance(key, Key):
        raise TypeError(f"key must be a medfast_kernels.Key, got {type(key).__name__}")
    sample = key.sample
    if sample is None:
        raise ValueError("this draw needs key.sample, a (b,) int64 tensor of global slots; it is None")
    if not isinstance(sample, Tensor) or sample.dtype != torch.int64 or sample.dim() != 1:
        got = f"{sample.dtype} {tuple(sample.shape)}" if isinstance(sample, Tensor) else repr(sample)
        raise ValueError(f"key.sample must be a (b,) int64 tensor of global slots, got {got}")
    for name, word in (("step", key.step), ("stream", key.stream)):
        if isinstance(word, Tensor) and word.numel() not in (1, len(sample)):
            raise ValueError(f"key.{name} must hold one entry or {len(sample)}, got {tuple(word.shape)}")
        if isinstance(word, (float, str)) or isinstance(word, Tensor) and word.is_floating_point():
            raise TypeError(f"key.{name} must be an int or a tensor of integers, got {word!r}")
    return sample


def with_samples(key: Key | None, batch: int, device: torch.device) -> Key:
    """``key`` with its samples filled in: 0, 1, ... where there are none."""
    if key is None:
        raise ValueError("a draw needs key, a medfast_kernels.Key; got None")
    if isinstance(key, Key) and key.sample is None:
        key = key._replace(sample=torch.arange(batch, device=device))
    sample = check_key(key)
    if len(sample) != batch:
        raise ValueError(f"key.sample must be (b,) = ({batch},), got {tuple(sample.shape)}")
    return key


def eager(value: Tensor) -> bool:
    """Whether what ``value`` contains can be looked at: it is no stand-in of a tracer."""
    return not TRACED or type(value) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()


def reads_values(schema: str) -> Callable[[Callable[..., None]], Callable[..., Tensor]]:
    """Make a function that raises where a tensor contains what it should not one that hands that tensor on.

    A compiled graph can hold no branch on what a tensor contains, so there it is an operator; elsewhere it is called as
    it is. schema: of the operator, such as ``"positive(Tensor value) -> Tensor"``, the tensor first.
    """
    name = schema.partition("(")[0]
    others = schema.partition("->")[0].count(",")

    def decorate(refuse: Callable[..., None]) -> Callable[..., Tensor]:
        def clone(value: Tensor, *rest) -> Tensor:
            refuse(value, *rest)
            return value.clone()

        operator = clone
        if TRACED:
            operator = torch.library.custom_op(
                f"{NAMESPACE}::{name}", clone, mutates_args=(), schema=schema.removeprefix(name)
            )
            operator.register_fake(lambda value, *_: torch.empty_like(value))
            operator.register_autograd(lambda ctx, grad: (grad, *[None] * others))

        def check(value: Tensor, *rest) -> Tensor:
            if not eager(value):
                return operator(value, *rest)
            refuse(value, *rest)
            return value

        return check

    return decorate


def within(value: Share, name: str, low: float, high: float) -> Share:
    """``value``, or ValueError where it, or an entry of it, is outside [low, high] or NaN.

    Tensors are read on a CPU only: elsewhere the answer would cost a synchronisation.
    """
    if isinstance(value, Tensor):
        if value.device.type != "cpu":
            return value
        return _within(value, name, low, high)  # type: ignore[return-value]  # a Tensor, as value is
    if value is not None and not low <= value <= high:
        raise ValueError(f"{name} must be in [{low}, {high}], got {value}")
    return value


@reads_values("within(Tensor value, str name, float low, float high) -> Tensor")
def _within(value: Tensor, name: str, low: float, high: float) -> None:
    if value.numel() == 0:
        return
    least, most = (x.item() for x in value.detach().aminmax())  # both NaN if one entry is
    if least != least:
        raise ValueError(f"{name} holds NaN: {int(value.isnan().sum())} of {value.numel()} entries")
    if not low <= least <= most <= high:
        raise ValueError(f"{name} must be in [{low}, {high}], got {least} to {most}")
