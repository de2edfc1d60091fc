"""How far two clouds of points are apart, through kernel density estimates (SwinFUSE, eqs. 2 and 3)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from medfast.objectives.losses import at_least_fp32


def jensen_shannon(a: Tensor, b: Tensor) -> Tensor:
    """Jensen-Shannon divergence of the densities of each sample's two clouds, (samples,) in [0, ln 2] nats.

    a, b: (samples, points, dim), at least two points. Densities are sums of Gaussian kernels whose deviation is the
    mean distance to the nearest other point, of both clouds together and without gradient; a point is not its own
    kernel. Each is evaluated at all points of both clouds and normalised over them.
    """
    points = at_least_fp32(torch.cat((a, b), dim=1))
    with torch.autocast(points.device.type, enabled=False):
        # centred, so that the squares below do not cancel
        x = points - points.mean(dim=1, keepdim=True).detach()
        length = x.square().sum(dim=-1)
        squares = (length.unsqueeze(2) + length.unsqueeze(1) - 2.0 * x @ x.transpose(1, 2)).clamp(min=0.0)
        own = torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
        squares = squares.masked_fill(own, torch.inf)
        deviation = squares.detach().amin(dim=2).sqrt().mean(dim=1).clamp(min=1e-6)
        kernels = (-0.5 * squares / deviation.square().view(-1, 1, 1)).split((a.shape[1], b.shape[1]), dim=2)
        one, other = (kernel.logsumexp(dim=2).log_softmax(dim=1) for kernel in kernels)
        middle = torch.logaddexp(one, other) - math.log(2.0)
        sides = [(p.exp() * (p - middle)).sum(dim=1) for p in (one, other)]
        return 0.5 * (sides[0] + sides[1])
