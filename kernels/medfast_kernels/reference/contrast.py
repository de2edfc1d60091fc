"""The token-wise contrast in plain PyTorch: the definition that every other backend is held to.

NT-Xent over tokens (SimCLR, Chen et al., ICML 2020; SimPROT-W, eq. 3 as reconstructed): the positive of a token is the
same token of the other view, every other token is a negative, and negatives at the same position of another volume are
weighted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import no_autocast
from .._contrast import Problem, check


def token_contrast(
    z: Tensor,
    *,
    temperature: float = 0.5,
    weight: float = 1.0,
    weight_mode: str = "exp",
    volume: Tensor | None = None,
    anchors: tuple[int, int] | None = None,
) -> Tensor:
    """``medfast_kernels.token_contrast`` in plain PyTorch, whatever backend is asked for. Forms all n x n logits."""
    return contrast(
        check(z, temperature=temperature, weight=weight, weight_mode=weight_mode, volume=volume, anchors=anchors)
    )


def contrast(problem: Problem) -> Tensor:
    """The mean over anchors of log sum_j exp(logit_ij) - logit_ip, a scalar."""
    views, volumes, positions, _ = problem.z.shape
    with no_autocast(problem.z.device):
        z = problem.z.to(problem.dtype).flatten(0, 2)
        token = torch.arange(len(z), device=z.device)
        crop, position = token // positions % volumes, token % positions
        volume = crop if problem.volume is None else problem.volume[crop]
        anchor = token.view(views, volumes, -1)[:, problem.first : problem.first + problem.count].flatten()
        similarity = z[anchor] @ z.T / problem.temperature
        positive = similarity.gather(1, (anchor[:, None] + len(z) // views) % len(z))[:, 0]
        weighted = (position[anchor, None] == position) & (volume[anchor, None] != volume)
        logits = torch.where(weighted, problem.factor * similarity + problem.offset, similarity)
        logits = logits.masked_fill(anchor[:, None] == token, -torch.inf)
        return (logits.logsumexp(1) - positive).mean()
