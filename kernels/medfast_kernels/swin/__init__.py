"""Window attention of other projects' Swin models on ``window_attention``, in place and undone at will.

    for row in medfast_kernels.swin.accelerate(model):
        print(*row)

Known: MONAI's SwinTransformer and SwinUNETR, SMIT, timm's Swin and Swin V2, torchvision's Swin, Swin V2 and Swin3D, and
Video-Swin. None of them is imported: modules are recognised by the names of their classes and by how they are built.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from torch import nn

from ._swap import Parts, is_swapped, mixed
from .monai import swap_layer
from .smit import SMIT
from .timm import TIMM
from .torchvision import TORCHVISION
from .video_swin import VIDEO_SWIN

LAYOUTS = (*TIMM, *TORCHVISION, VIDEO_SWIN, SMIT)


class Row(NamedTuple):
    """One window attention of a model. new is None where it was left as it is, and reason says why; else it is ""."""

    name: str
    old: type
    new: type | None
    reason: str


def accelerate(model: nn.Module) -> list[Row]:
    """Let the window attention of ``model`` run on ``window_attention``, in place; ``restore`` undoes it.

    Returns a row for every window attention it met: swapped, or left and why. Empty if there is none it could know.

    Parameters, buffers, their names and values, hooks and the rest of the model stay as they are: modules only change
    their class, to one derived from it, so checkpoints fit both ways. Outputs and gradients are theirs up to rounding;
    their drop path and projection dropout stay (the latter draws in the order of the map, so its pattern for a given
    seed is another one). What their masks lower by 100 is hidden altogether: a difference where scores of one row are
    some 80 apart, which only a Swin V2 with scales near their cap can reach.

    Attention with dropout of its own, with hooks, with other submodules or in an unknown subclass is left. Call it
    before ``fully_shard``, DDP and ``torch.compile``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    modules = dict(model.named_modules())
    plans = {}
    for name, module in modules.items():  # all of them before the first swap: an error leaves the model as it was
        layout = next((layout for layout in LAYOUTS if layout.recognises(module)), None)
        if layout is not None:
            plans[name] = layout.plan(module)
    swapped = [_swap(name, modules[name], plan) for name, plan in plans.items()]
    rows = {row.name: row for row in swapped}
    for name, module in modules.items():
        swap_layer(module)
        if name not in rows and _attends_in_windows(module):
            parent = modules.get(name.rpartition(".")[0], model)
            rows[name] = Row(name, type(module), None, _why_unknown(module, parent))
    return [rows[name] for name in modules if name in rows]


def restore(model: nn.Module) -> None:
    """Give every module that ``accelerate`` swapped its own class back; RuntimeError where a wrapper is in the way."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        if is_swapped(module):
            module.__class__ = vars(type(module))["replaced"]
        elif hasattr(type(module), "replaced"):
            raise RuntimeError(
                f"{name} was accelerated and then made a {type(module).__name__} (fully_shard does that): restore the "
                "model before it is wrapped"
            )


def _swap(name: str, module: nn.Module, plan: Parts | str) -> Row:
    if isinstance(plan, str):
        attention = getattr(module, "attn", module)
        return Row(_join(name, "" if attention is module else "attn"), type(attention), None, plan)
    attention, old = plan[0][0], type(module.get_submodule(plan[0][0]))
    for path, behaviour in plan:
        part = module.get_submodule(path)
        part.__class__ = mixed(behaviour, type(part))
    return Row(_join(name, attention), old, type(module.get_submodule(attention)), "")


def _attends_in_windows(module: nn.Module) -> bool:
    return any(re.search(r"Window(MultiHead)?Attention", base.__name__) for base in type(module).__mro__)


def _why_unknown(module: nn.Module, parent: nn.Module) -> str:
    if is_swapped(module):
        return "it is accelerated already"
    return (
        f"no layout known here fits {type(module).__name__} inside {type(parent).__name__}: known are the classes of "
        "MONAI, SMIT, timm, torchvision and Video-Swin themselves, not what is derived from them or wrapped by FSDP"
    )


def _join(name: str, path: str) -> str:
    return ".".join(filter(None, (name, path)))
