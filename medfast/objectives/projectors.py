"""MLPs on top of a vector or of each token, with and without batch statistics."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medfast.objectives.contrast import Groups
from medfast.objectives.losses import at_least_fp32


class Projector(nn.Sequential):
    """width -> 2 width -> width, L2-normalised: (..., width) -> same (SimCLR and SimPROT as SimTROT has them).

    relu_last: a ReLU after the second layer too, as in SimTROT's code, which leaves no vector two opposite directions.
    """

    def __init__(self, width: int, relu_last: bool = False):
        layers = [nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width)]
        super().__init__(*layers, *([nn.ReLU()] if relu_last else []))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(at_least_fp32(super().forward(x)), dim=-1)


class BatchNorm(nn.Module):
    """Each channel normalised over the samples and tokens of a group, each view by itself, in fp32 at least.

    (b, views, ..., width) -> same. There are no running statistics, which would differ by rank: outside training, too,
    the samples that are shown are normalised by their own.
    """

    def __init__(self, width: int, affine: bool = True, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width)) if affine else None
        self.bias = nn.Parameter(torch.zeros(width)) if affine else None

    def forward(self, x: Tensor, groups: Groups) -> Tensor:
        x, over = at_least_fp32(x), (0, *range(2, x.dim() - 1))
        made = []
        for share in groups.shares(x):
            variance, mean = torch.var_mean(share.members, dim=over, correction=0, keepdim=True)
            made.append((share.own - mean) * (variance + self.eps).rsqrt())
        x = torch.cat(made)
        return x if self.weight is None or self.bias is None else x * self.weight + self.bias


class NormedMLP(nn.Module):
    """Linear layers with batch norm and ReLU between them: (b, views, ..., widths[0]) -> (..., widths[-1]).

    last_norm: batch norm without affine after the last layer too (MoCo v3). Layers before a batch norm have no bias,
    which it would take away.
    """

    def __init__(self, widths: Sequence[int], last_norm: bool = False):
        super().__init__()
        count = len(widths) - 1
        plain = [i + 1 == count and not last_norm for i in range(count)]
        self.linears = nn.ModuleList(
            nn.Linear(wide, narrow, bias=bias) for (wide, narrow), bias in zip(pairwise(widths), plain, strict=True)
        )
        self.norms = nn.ModuleList(
            BatchNorm(width, affine=i + 1 < count) for i, width in enumerate(widths[1:]) if not plain[i]
        )

    def forward(self, x: Tensor, groups: Groups) -> Tensor:
        for i, linear in enumerate(self.linears):
            x = linear(x)
            if i < len(self.norms):
                x = self.norms[i](x, groups)
            if i + 1 < len(self.linears):
                x = F.relu(x)
        return x
