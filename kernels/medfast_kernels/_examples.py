"""An example problem or more of every operator: what ``qualify`` checks and times, and tests compare backends on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import contrast, random, tokens
from .augmentation import augment
from .class_token import class_attention
from .key import Key, Role
from .masking import attention_mask
from .window import window_attention

Tensors = dict[str, Tensor]


class Example(NamedTuple):
    """tensors: what the call takes, floating ones in fp64 on CPU. call: the public operator on them, wherever they are.

    exact: every backend gives the same bits.
    """

    name: str
    tensors: Tensors
    call: Callable[..., Any]
    exact: bool = False


def examples(operator: str, large: bool = False) -> list[Example]:
    """Small ones of every mode, or the one that is timed."""
    generator = torch.Generator().manual_seed(0)
    return _MAKERS[operator](_Draw(generator), large)


class _Draw(NamedTuple):
    generator: torch.Generator

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def samples(self, batch: int) -> Tensor:
        return torch.arange(batch) * 2**29 + 1

    def key(self, batch: int, role: Role) -> Key:
        return Key(2**63 + 5, step=3, sample=self.samples(batch)).at(role, layer=2)


def _window(draw: _Draw, large: bool) -> list[Example]:
    modes: dict[str, dict[str, Any]] = {
        "shifted": {"grid": (9, 8, 6), "window": 4, "shift": 2},
        "live pads": {"grid": (9, 10, 5), "window": (4, 3, 4), "shift": (2, 1, 2), "pad_value": True},
        "masked pads": {"grid": (9, 7, 5), "window": 4, "shift": 1, "pad": "mask"},
        "clipped": {"grid": (9, 3, 3), "window": 4, "shift": 2, "bias_index": "sliced"},
        # eight heads: the error of a gradient of two numbers is a matter of luck
        "cosine": {"grid": (8, 8), "window": 8, "shift": 4, "cosine": True, "scale": True, "dim": 32, "heads": 8},
        "window 7": {"grid": (8, 9, 7), "window": 7, "shift": 3, "dim": 16},
        "dropout": {"grid": (6, 5, 4), "window": 3, "shift": 1, "dropout": 0.4},
        "kept samples": {"grid": (6, 5, 4), "window": 3, "keep": True},
    }
    if large:
        modes = {"stage 1": {"grid": (32, 32, 32), "window": 4, "shift": 2, "heads": 4}}
    return [_one_window(draw, name, **mode) for name, mode in modes.items()]


def _one_window(draw: _Draw, name: str, grid: tuple[int, ...], window: Any, heads: int = 2, dim: int = 12, **mode: Any):
    full = (window,) * len(grid) if isinstance(window, int) else window
    made = {"qkv": draw.normal(2, *grid, 3, heads, dim), "bias": draw.normal(math.prod(2 * w - 1 for w in full), heads)}
    if mode.pop("pad_value", False):
        made["pad_value"] = draw.normal(3, heads, dim)
    if mode.pop("scale", False):
        made["scale"] = 4 + draw.normal(heads)
    if mode.pop("keep", False):
        made["keep"] = torch.tensor([False, True])
    if mode.get("dropout"):
        mode["key"] = draw.key(2, Role.DROPOUT)
    return Example(name, made, lambda **given: window_attention(**given, window=window, **mode))


def _class_attention(draw: _Draw, large: bool) -> list[Example]:
    batch, n, heads, dim = (4, 4096, 6, 32) if large else (3, 77, 2, 24)
    made = {"q": draw.normal(batch, heads, dim)}
    made |= {name: draw.normal(batch, 1 + n, heads, dim) for name in ("k", "v")}
    return [Example("one token asks", made, class_attention)]


def _attention_mask(draw: _Draw, large: bool) -> list[Example]:
    attention = draw.normal(*((8, 4096) if large else (3, 300))).float().round(decimals=1)  # many equals
    modes: dict[str, dict[str, Any]] = {"hints": {"hint": 0.1, "key": draw.key(len(attention), Role.HINTS)}}
    if not large:
        modes |= {"top hints": {"hint": 0.1, "hint_mode": "top"}, "low": {"order": "low"}}

    def example(name: str, mode: dict[str, Any]) -> Example:
        return Example(name, {"attention": attention}, lambda attention: attention_mask(attention, 0.7, **mode), True)

    return [example(name, mode) for name, mode in modes.items()]


def _random(function: Callable[..., Tensor], small: tuple, big: tuple, exact: bool = True):
    def make(draw: _Draw, large: bool) -> list[Example]:
        batch = 8 if large else 3
        key = draw.key(batch, Role.MASK)

        def call(sample: Tensor) -> Tensor:
            return function(*(big if large else small), key=key._replace(sample=sample))

        return [Example("draw", {"sample": draw.samples(batch)}, call, exact)]

    return make


def _drop_tokens(draw: _Draw, large: bool) -> list[Example]:
    batch, n, count, dim = (4, 4096, 1228, 192) if large else (3, 50, 17, 20)
    ids = random.random_ids(n, count, key=draw.key(batch, Role.MASK))
    made = {"x": draw.normal(batch, n, dim), "ids": ids}
    example = Example("with positions", made | {"position": draw.normal(n, dim)}, tokens.drop_tokens)
    return [example] if large else [example, Example("without", made, tokens.drop_tokens)]


def _restore_tokens(draw: _Draw, large: bool) -> list[Example]:
    batch, n, count, dim = (4, 4096, 1228, 192) if large else (3, 50, 17, 20)
    ids = random.random_ids(n, count, key=draw.key(batch, Role.MASK))
    made = {"y": draw.normal(batch, count, dim), "ids": ids, "fill": draw.normal(dim)}
    return [Example("fill", made, lambda **given: tokens.restore_tokens(**given, n=n))]


def _token_contrast(draw: _Draw, large: bool) -> list[Example]:
    shape = (2, 8, 256, 64) if large else (2, 4, 33, 24)
    z = torch.nn.functional.normalize(draw.normal(*shape), dim=-1)
    modes: Mapping[str, dict[str, Any]] = {"exp": {"weight": 2.0}}
    if not large:
        modes = {**modes, "logit": {"weight": 0.5, "weight_mode": "logit"}, "shares": {"anchors": (1, 2)}}

    def example(name: str, mode: dict[str, Any]) -> Example:
        return Example(name, {"z": z}, lambda z: contrast.token_contrast(z, **mode))

    return [example(name, mode) for name, mode in modes.items()]


def _augment(draw: _Draw, large: bool) -> list[Example]:
    """All of it, on boxes of different extents that are turned in different ways; sizes are no whole vectors."""
    size, most = ((96, 96, 96), (3, 112, 120, 104)) if large else ((9, 14, 14), (3, 11, 17, 18))
    boxes = (400 * draw.normal(*most)).to(torch.int16)
    modes: dict[str, dict[str, Any]] = {
        "all": {"extent": torch.tensor([(size[0], *most[2:]), most[1:], size]), "turn": torch.tensor([5, 10, 12]),
                "blur": torch.tensor([0.0, 1.4, 0.7]), "gain": 1.1, "shift": torch.tensor([0.0, 0.2, -0.1]),
                "contrast": torch.tensor([1.0, 0.8, 1.2]), "gamma": torch.tensor([1.0, 1.3, 1.1]),
                "noise": torch.tensor([0.1, 0.0, 0.05])}}  # fmt: skip
    if not large:
        modes |= {"window alone": {}, "turned": {"extent": torch.tensor([size] * 3), "turn": torch.tensor([1, 7, 8])}}
    key = draw.key(3, Role.NOISE)

    def example(name: str, mode: dict[str, Any]) -> Example:
        def call(boxes: Tensor, sample: Tensor) -> Tensor:
            return augment(boxes, size, window=(-500, 500), key=key._replace(sample=sample), **mode)

        return Example(name, {"boxes": boxes, "sample": draw.samples(3)}, call)

    return [example(name, mode) for name, mode in modes.items()]


_MAKERS: dict[str, Callable[[_Draw, bool], list[Example]]] = {
    "window_attention": _window,
    "class_attention": _class_attention,
    "token_contrast": _token_contrast,
    "attention_mask": _attention_mask,
    "philox_words": _random(lambda count, key: random.philox_words(key, count), (70,), (65536,)),
    "random_ids": _random(random.random_ids, (300, 100), (4096, 1228)),
    "random_keep": _random(random.random_keep, (0.3,), (0.3,)),
    "random_uniform": _random(random.random_uniform, ((7, 9),), (65536,)),
    "random_normal": _random(random.random_normal, ((7, 9),), (65536,), exact=False),
    "drop_tokens": _drop_tokens,
    "restore_tokens": _restore_tokens,
    "augment": _augment,
}
