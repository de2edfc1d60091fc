"""Parameter groups, schedules of rate and weight decay, clipping."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from medfast.training.settings import Optim

__all__ = ["Group", "adamw", "clip", "groups", "rates", "set_rates"]


@dataclass(frozen=True)
class Group:
    """Parameters under one rule. decays: weight decay applies. frozen_until: t of their start. lr_scale: times lr."""

    names: tuple[str, ...]
    decays: bool
    frozen_until: float
    lr_scale: float


def groups(parameters: Mapping[str, nn.Parameter], optim: Optim) -> list[Group]:
    """Trained parameters by rule, in order of first appearance; biases and one-dimensional ones do not decay.

    Of several patterns of ``optim.frozen`` that match the longest share holds, of ``optim.lr_scale`` the last one.
    ValueError names a pattern that matches nothing.
    """
    frozen, scales = optim.frozen or {}, optim.lr_scale or {}
    trained = {name: p for name, p in parameters.items() if p.requires_grad}
    for key, patterns in (("frozen", frozen), ("lr_scale", scales)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in trained):
                some = ", ".join(list(trained)[-5:])
                raise ValueError(f"optim.{key}: {pattern!r} matches no parameter; the last five are {some}")
    found: dict[tuple[bool, float, float], list[str]] = {}
    for name, parameter in trained.items():
        until = max((share for pattern, share in frozen.items() if fnmatchcase(name, pattern)), default=0.0)
        scale = [1.0, *(factor for pattern, factor in scales.items() if fnmatchcase(name, pattern))][-1]
        decays = parameter.ndim > 1 and not name.endswith("bias")
        found.setdefault((decays, until, float(scale)), []).append(name)
    return [Group(tuple(names), *rule) for rule, names in found.items()]


def adamw(parameters: Mapping[str, nn.Parameter], rules: Iterable[Group], optim: Optim) -> torch.optim.AdamW:
    """AdamW with one parameter group per rule, in their order; rates are set before each step."""
    members = [{"params": [parameters[name] for name in group.names]} for group in rules]
    return torch.optim.AdamW(members, lr=0.0, betas=(float(optim.betas[0]), float(optim.betas[1])), weight_decay=0.0)


def _cosine(start: float, end: float, t: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * t)) / 2


def rates(optim: Optim, t: float) -> tuple[float, float]:
    """(learning rate, weight decay) at t: warm-up from 0, then cosine to min_lr; one cosine of the decay."""
    decay = _cosine(optim.weight_decay[0], optim.weight_decay[1], t)
    if t < optim.warmup:
        return optim.lr * t / optim.warmup, decay
    return _cosine(optim.lr, optim.min_lr, (t - optim.warmup) / (1 - optim.warmup)), decay


def set_rates(param_groups: list[dict], rules: list[Group], lr: float, decay: float, t: float) -> None:
    """Write this step's rate and decay into an optimizer's groups; a frozen group has neither."""
    for group, rule in zip(param_groups, rules, strict=True):
        moves = t >= rule.frozen_until
        group["lr"] = lr * rule.lr_scale if moves else 0.0
        group["weight_decay"] = decay if moves and rule.decays else 0.0


@torch.no_grad()
def clip(
    gradients: list[Tensor], rule: Mapping[str, object] | None, total: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Clip reduced gradients in place; returns the global L2 norm that they had, a 0-dim tensor.

    "global" scales all by max / norm, "per_parameter" each by its own (author code of SMIT, DINO), where norm > max.
    total: the sum over ranks, where each of them holds another part of every gradient; collective then.
    """
    norms = torch.stack(list(torch._foreach_norm(gradients)))
    if total is not None:
        norms = total(norms.double().square()).sqrt().to(norms.dtype)
    whole = torch.linalg.vector_norm(norms)
    if rule is None:
        return whole
    most = float(str(rule["max"]))
    if rule["kind"] == "global":
        torch._foreach_mul_(gradients, (most / (whole + 1e-6)).clamp(max=1.0))
    else:
        torch._foreach_mul_(gradients, list((most / (norms + 1e-6)).clamp(max=1.0)))
    return whole
