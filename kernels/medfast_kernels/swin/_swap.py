"""How a module of somebody else's model gets another forward in place, and what is looked at before."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..window import window_attention

Parts = tuple[tuple[str, type], ...]


class Layout(NamedTuple):
    """One project's way to build window attention.

    Recognised are modules of a class of one of these names, in a Python module that starts so ("": any, for some code
    is only ever copied), that have all of ``marks`` as attributes. plan: what changes, (path below the module, new
    behaviour) with the attention first, or the reason why this module has to stay as it is.
    """

    classes: frozenset[str]
    package: str
    marks: tuple[str, ...]
    plan: Callable[[Any], Parts | str]

    def recognises(self, module: nn.Module) -> bool:
        cls = type(module)
        there = cls.__name__ in self.classes and cls.__module__.startswith(self.package)
        return there and all(hasattr(module, mark) for mark in self.marks)


class Swapped:
    """Mixed into the class of every swapped module; ``replaced`` is the class it had."""

    replaced: type

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copied and pickled as the class it had and what was mixed in: the mixed class has no name to be found by."""
        if is_swapped(self):
            return _blank, type(self).__bases__, self.__dict__
        return super().__reduce_ex__(protocol)


@cache
def mixed(behaviour: type, old: type) -> type:
    """The class ``old`` with the forward of ``behaviour``; the same class every time."""
    return type(f"Fused{old.__name__}", (behaviour, old), {"replaced": old, "__module__": behaviour.__module__})


def _blank(behaviour: type, old: type) -> object:
    cls = mixed(behaviour, old)
    return object.__new__(cls)


def is_swapped(module: object) -> bool:
    """Whether this module's own class is a mixed one; one that was derived from it since (FSDP2) does not count."""
    return "replaced" in vars(type(module))


class Attention(Swapped):
    """Attention of a module with ``qkv`` and ``proj``, on the map (b, *grid, c) instead of on windows."""

    num_heads: int
    qkv: nn.Linear
    proj: nn.Linear

    def attend(self, x: Tensor, qkv_bias: Tensor | None, table: Tensor, **geometry: Any) -> Tensor:
        """Project, attend, project. A pad token holds what QKV makes of zeros, as padding before it gives."""
        shape = (3, self.num_heads, -1)
        own = qkv_bias is self.qkv.bias
        qkv = self.qkv(x) if own else nn.functional.linear(x, self.qkv.weight, qkv_bias)
        pad_value = None if qkv_bias is None else qkv_bias.view(shape)
        return self.proj(window_attention(qkv.unflatten(-1, shape), table, pad_value=pad_value, **geometry))


class TableAttention(Attention):
    """With a table of relative positions; the block says which window and shift."""

    scale: float
    proj_drop: nn.Module
    relative_position_bias_table: Tensor

    def forward(
        self, x: Tensor, window: Sequence[int], shift: Sequence[int], clip: bool, bias_index: str = "geometric"
    ) -> Tensor:
        out = self.attend(
            x, self.qkv.bias, self.relative_position_bias_table, window=tuple(window), shift=tuple(shift),
            scale=self.scale, clip=clip, bias_index=bias_index,
        )  # fmt: skip
        return self.proj_drop(out)


TABLE_ANATOMY = {"qkv", "attn_drop", "proj", "proj_drop", "softmax", "relative_position_bias_table"}
_HOOKS = ("forward_pre", "forward", "backward_pre", "backward")
BLOCK_ANATOMY = {"norm1", "attn", "drop_path", "norm2", "mlp"}


def strange(module: nn.Module, anatomy: set[str]) -> str | None:
    """Why a module is not the one its name says: children, parameters and buffers that are missing or unknown.

    Two buffers may be there or not: the index of relative positions is checked by its values, a shift mask is not read.
    """
    names = {name for name, _ in module.named_children()}
    names |= {name for name, _ in module.named_parameters(recurse=False)}
    names |= {name for name, _ in module.named_buffers(recurse=False)}
    names -= {"relative_position_index", "attn_mask"}
    if names == anatomy:
        return None
    found = [f"{', '.join(sorted(names - anatomy))} added"] if names - anatomy else []
    found += [f"{', '.join(sorted(anatomy - names))} missing"] if anatomy - names else []
    return f"{type(module).__name__} is built otherwise than the one known here: {'; '.join(found)}"


def unfit_attention(attention: Any, anatomy: set[str], dropout: float | None = None) -> str | None:
    """Why an attention module can not be swapped, whatever project it is of. dropout: None reads ``attn_drop.p``."""
    reason = strange(attention, anatomy)
    if reason is not None:
        return reason
    missing = [name for name in ("num_heads", "window_size", "relative_position_index") if not hasattr(attention, name)]
    if missing:
        return f"{type(attention).__name__} has no {', '.join(missing)}"
    if not isinstance(attention.qkv, nn.Linear):
        return f"qkv is a {type(attention.qkv).__name__}, not a Linear: what it makes of padding is not known"
    drop = getattr(attention, "attn_drop", None)
    if dropout is None and not isinstance(drop, (nn.Dropout, nn.Identity)):
        return f"attn_drop is a {type(drop).__name__}, no Dropout or Identity: what it makes of weights is not known"
    rate = getattr(drop, "p", 0.0) if dropout is None else dropout
    if rate > 0:
        return (
            f"attention dropout {rate} draws from torch's generator, which the operator does not: build the model "
            "with 0, or set it to 0 before for a model that only evaluates"
        )
    inside = ((name, getattr(attention, name, None)) for name in ("softmax", "attn_drop"))
    for name, part in (("it", attention), *inside):
        if any(getattr(part, f"_{when}_hooks", None) for when in _HOOKS):
            return f"hooks are registered on {name}, and would see a map where they expect windows: remove them before"
    return _unfit_index(attention)


def _unfit_index(attention: Any) -> str | None:
    index = attention.relative_position_index
    if index.is_meta:
        return None
    window = per_axis(attention.window_size, 2)
    at = torch.cartesian_prod(*[torch.arange(w) for w in window]).reshape(-1, len(window))
    strides = [math.prod(2 * w - 1 for w in window[axis + 1 :]) for axis in range(len(window))]
    rows = ((at[:, None] - at[None] + torch.tensor(window) - 1) * torch.tensor(strides)).sum(-1)
    if torch.equal(index.cpu().reshape(-1), rows.reshape(-1)):
        return None
    return f"its relative_position_index is not that of a window of {'x'.join(map(str, window))}"


def per_axis(value: int | Sequence[int], axes: int) -> tuple[int, ...]:
    """An int for all axes, or one for each."""
    return (value,) * axes if isinstance(value, int) else tuple(value)


class _Echo(nn.Module):
    """In the place of an attention: gives back the windows it is shown."""

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        return x


def unfit_block(block: Any) -> str | None:
    """Why a block of Video-Swin's kind, or its attention, can not be swapped."""
    reason = strange(block, BLOCK_ANATOMY)
    if reason is not None:
        return reason
    if not all(isinstance(getattr(block, name, None), (tuple, list)) for name in ("window_size", "shift_size")):
        return f"{type(block).__name__} has no window_size and shift_size with an entry per axis"
    return unfit_attention(block.attn, TABLE_ANATOMY)


def arrangement(block: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor | None:
    """What ``run(x)`` gives where all children of the block hand back what they get; None where that does not work.

    Tells where a block puts its tokens, without looking at how it is written and without calling its attention.
    """
    children = {name: block._modules[name] for name in BLOCK_ANATOMY}
    block._modules.update({name: _Echo() for name in BLOCK_ANATOMY})
    try:
        with torch.no_grad():
            return run(x)
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return None
    finally:
        block._modules.update(children)
