"""How attention heads spread: their entropies, recomputed with the plain PyTorch definition of the operator.

Kernels never hold attention weights, so a gauge that wants them asks the modules for them once more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["head_entropies"]

MOST = 16  # tokens per axis of a map, from its middle: weights of a whole one may be gigabytes


@torch.no_grad()
def head_entropies(network: nn.Module, look: Callable[[], Any]) -> list[tuple[str, Tensor]]:
    """Of every attention module that ``look()`` runs in ``network``, in order: (its name, entropies of its heads).

    An entropy is the mean over queries of -sum_j A_ij ln A_ij over that of a query that looks everywhere alike: 1 for a
    head of such queries, 0 for one that looks at one token. Of the first sample, fp32. Attention modules are those that
    have ``attention_weights``, which takes the arguments of forward that are maps (b, *grid, width) or rows (b, n,
    width) and returns (b, windows, heads, N, N). [] where there are none. Sources: Xie et al., CVPR 2023 ("The dark
    secrets of masked image modeling"), as SMART's journal version reports them; Zhai et al., ICML 2023, for collapse.
    """
    found: list[tuple[str, Tensor]] = []
    with _watched(network, found):
        look()
    return found


@contextmanager
def _watched(network: nn.Module, found: list[tuple[str, Tensor]]) -> Iterator[None]:
    def watch(name: str) -> Callable[..., None]:
        def hook(module: Any, arguments: tuple[Any, ...]) -> None:
            maps = (_middle(x[:1], module) for x in arguments if isinstance(x, Tensor) and x.is_floating_point())
            found.append((name, _entropies(module.attention_weights(*maps))))

        return hook

    hooks = [
        module.register_forward_pre_hook(watch(name))
        for name, module in network.named_modules()
        if hasattr(module, "attention_weights")
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _entropies(weights: Tensor) -> Tensor:
    """(b, windows, heads, N, N) -> (heads,), over queries that may see more than one key: some are masked, for all
    heads."""
    keys = (weights > 0).any(dim=0).any(dim=1).sum(dim=-1)  # (windows, N)
    chooses = (keys > 1).to(weights.dtype)
    each = torch.special.entr(weights).sum(dim=-1) * (chooses / keys.clamp(min=2).log()).unsqueeze(1)
    return each.mean(dim=0).sum(dim=(0, 2)) / chooses.sum().clamp(min=1.0)


def _middle(x: Tensor, module: Any) -> Tensor:
    """The middle of a map, whole windows of it where that is more than one; rows as they are."""
    grid = x.shape[1:-1]
    window = getattr(module, "window", None)
    if len(grid) < 2 or window is None:
        return x
    sizes = (window,) * len(grid) if isinstance(window, int) else tuple(window)
    for axis, (n, w) in enumerate(zip(grid, sizes, strict=True), start=1):
        kept = max(MOST // w, 1) * w
        if n > kept:
            x = x.narrow(axis, (n - kept) // 2, kept)
    return x
