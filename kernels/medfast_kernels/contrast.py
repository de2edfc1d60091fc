"""Token-wise weighted contrast between two views, without its n x n similarities."""

from __future__ import annotations

from torch import Tensor

from ._contrast import check
from ._cpp import contrast as cpp
from ._dispatch import choose
from ._triton import contrast as triton
from .reference.contrast import contrast


def token_contrast(
    z: Tensor,
    *,
    temperature: float = 0.5,
    weight: float = 1.0,
    weight_mode: str = "exp",
    volume: Tensor | None = None,
    anchors: tuple[int, int] | None = None,
) -> Tensor:
    """Mean over tokens of -s_ip + log(sum_j w_ij exp(s_ij)), s_ij = z_i . z_j / temperature (SimPROT-W, eq. 3).

    z: (2 views, volumes, positions, dim), floating, any strides, L2-normalised along dim by the caller
    (MEDFAST_CHECK=1 in the environment verifies it). Returns a scalar, fp32, or fp64 for fp64 z; 16-bit input is
    computed in fp32. Differentiable, once, in z.

    p is the same token in the other view; j runs over all tokens of both views but i itself, p included. With
    positions = 1 and neutral weight this is NT-Xent (SimCLR, Chen et al. 2020) over volumes.

    weight_mode: what ``weight``, at least 0, does to pairs at the same position of different volumes, in either view.
        "exp": w_ij = weight, 1 is neutral; elsewhere w_ij = 1. "logit": s_ij is multiplied by 1 + weight, 0 is neutral
        (the released code of SimPROT-W, which does so in three of its four pairs: no parity is claimed).
    volume: (volumes,) integer ids; crops of one volume do not weight each other. None: all volumes differ.
    anchors: (first, count): only tokens of these volumes are anchors i, all stay candidates j; one rank's share of a
        gathered group. Shares weighted by their counts add up to the whole, gradients too.

    Raises ValueError for values and shapes, TypeError for kinds that no backend accepts.
    """
    problem = check(z, temperature=temperature, weight=weight, weight_mode=weight_mode, volume=volume, anchors=anchors)
    run = {"reference": contrast, "cpp": cpp.contrast, "triton": triton.contrast}
    return run[choose("token_contrast", z.device, triton.unfit(z))](problem)
