"""Draws from the generator as Triton operators. They take counter words 1 to 3 of each sample, ``key.address``."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..key import Key, address, signed
from .registration import operator

_BLOCK = 256
_DTYPES = {"word": torch.int64, "uniform": torch.float32, "normal": torch.float32}


def philox_words(key: Key, count: int, *, device: torch.device | None = None) -> Tensor:
    return _draw(address(key, device), count, signed(key.seed), "word")


def random_uniform(shape: tuple[int, ...] | int, *, key: Key, device: torch.device | None = None) -> Tensor:
    return _shaped(shape, key, device, "uniform")


def random_normal(shape: tuple[int, ...] | int, *, key: Key, device: torch.device | None = None) -> Tensor:
    return _shaped(shape, key, device, "normal")


def random_ids(n: int, count: int, *, key: Key, device: torch.device | None = None) -> Tensor:
    return _ids(address(key, device), n, count, signed(key.seed))


def random_keep(rate: float, *, key: Key, device: torch.device | None = None) -> Tensor:
    return _keep(address(key, device), rate, signed(key.seed))


def _shaped(shape: tuple[int, ...] | int, key: Key, device: torch.device | None, kind: str) -> Tensor:
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    counter = address(key, device)
    return _draw(counter, math.prod(shape), signed(key.seed), kind).reshape(len(counter), *shape)


def _launch_draw(counter: Tensor, count: int, seed: int, kind: str) -> Tensor:
    from . import random_kernels as kernels

    out = _fake_draw(counter, count, seed, kind)
    programs = -(-count // (4 * _BLOCK))
    if out.numel():
        kernels.draw[(len(counter) * programs,)](out, counter.contiguous(), seed, count, programs, kind, _BLOCK)
    return out


def _launch_keep(counter: Tensor, rate: float, seed: int) -> Tensor:
    from . import random_kernels as kernels

    out = _fake_keep(counter, rate, seed)
    if out.numel():
        grid = (-(-len(counter) // _BLOCK),)
        kernels.keep[grid](out, counter.contiguous(), seed, len(counter), rate, _BLOCK)
    return out


def _launch_ids(counter: Tensor, n: int, count: int, seed: int) -> Tensor:
    from . import random_selection as kernels

    out = _fake_ids(counter, n, count, seed)
    if out.numel():
        words = counter.new_empty((len(counter), n), dtype=torch.int32)
        kernels.ids[(len(counter),)](out, words, counter.contiguous(), seed, n, count, tile(n), num_warps=warps(n))
    return out


def tile(n: int) -> int:
    """Elements of a row that one program holds at a time, a power of two."""
    return min(2048, max(256, 1 << (n - 1).bit_length()))


def warps(n: int) -> int:
    """Four elements of the tile to a thread, so that histograms and scans of it stay in registers."""
    return tile(n) // 128


def _fake_draw(counter: Tensor, count: int, seed: int, kind: str) -> Tensor:
    return counter.new_empty((counter.shape[0], count), dtype=_DTYPES[kind])


def _fake_ids(counter: Tensor, n: int, count: int, seed: int) -> Tensor:
    return counter.new_empty((counter.shape[0], count))


def _fake_keep(counter: Tensor, rate: float, seed: int) -> Tensor:
    return counter.new_empty((counter.shape[0],), dtype=torch.bool)


_draw = operator(
    "random_draw_triton", "(Tensor counter, SymInt count, int seed, str kind) -> Tensor", _launch_draw, _fake_draw
)
_ids = operator(
    "random_ids_triton", "(Tensor counter, SymInt n, SymInt count, int seed) -> Tensor", _launch_ids, _fake_ids
)
_keep = operator("random_keep_triton", "(Tensor counter, float rate, int seed) -> Tensor", _launch_keep, _fake_keep)
