"""MoCo v3: queries of one view are told from keys that a slowly moving copy makes of the other views of a group.

Source: Chen, Xie and He, ICCV 2021, arXiv 2104.02057, and its public code. docs/papers/moco_v3.md maps it to functions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from medfast.objectives.contrast import Groups, by_sample, group_size, groups_of
from medfast.objectives.gauges import agreement
from medfast.objectives.losses import at_least_fp32
from medfast.objectives.options import momenta, positive, summary_width
from medfast.objectives.projectors import NormedMLP
from medfast.objectives.schedules import cosine
from medfast.objectives.views import stack_views
from medfast.types import Backbone, Batch, Objective, Output, Teacher


class MoCoV3(Objective):
    """contrast: 2 temperature x cross-entropy of each query with its own key among the keys of the group, both ways.

    group: samples whose keys are told apart, and that share batch statistics. width, hidden: of the heads' vectors and
    layers. momentum: first and last of the teacher's average, a cosine between them.
    """

    views = 2

    def __init__(
        self,
        backbone: Backbone,
        group: int = 256,
        temperature: float = 0.2,
        hidden: int = 4096,
        width: int = 256,
        momentum: Sequence[float] = (0.99, 1.0),
    ):
        super().__init__()
        self.backbone, self.group = backbone, group_size(group)
        self.temperature, self.momenta = positive("temperature", temperature), momenta(momentum)
        self.projector = NormedMLP((summary_width(backbone), hidden, hidden, width), last_norm=True)
        self.predictor = NormedMLP((width, hidden, width), last_norm=True)
        self.teacher = Teacher(self, "backbone", "projector")

    def forward(self, batch: Batch, t: Tensor) -> Output:
        volume, key = stack_views(batch, self.views)
        groups = groups_of(self)
        seen = by_sample(self.backbone(volume, key=key if self.training else None).summary)
        queries = unit(self.predictor(self.projector(seen, groups), groups))
        teacher = self.teacher
        assert teacher is not None
        with torch.no_grad():
            keys = unit(teacher.projector(by_sample(teacher.backbone(volume).summary), groups)).flip(1)
        loss = key_contrast(queries, keys, groups, self.temperature)
        return Output({"contrast": loss}, {"agreement": agreement(queries.transpose(0, 1).flatten(0, 1))})

    def momentum(self, t: float) -> float:
        """EMA momentum of the teacher at time t of the whole run."""
        return cosine(*self.momenta, t)

    @torch.no_grad()
    def tokens(self, batch: Batch, t: float = 0.0) -> dict[str, Tensor]:
        """For collapse gauges: "student" and "teacher" (2 * b, dim), the summary vectors."""
        volume, teacher = stack_views(batch, self.views)[0], self.teacher
        assert teacher is not None
        return {"student": self.backbone(volume).summary, "teacher": teacher.backbone(volume).summary}


def unit(x: Tensor) -> Tensor:
    """L2-normalised along the last axis, in fp32 at least."""
    return F.normalize(at_least_fp32(x), dim=-1)


def key_contrast(queries: Tensor, keys: Tensor, groups: Groups, temperature: float) -> Tensor:
    """2 T x the cross-entropy of softmax over a group's keys of q . k / T with a query's own key, mean over samples,
    sum over views (MoCo v3, algorithm 1).

    queries, keys: (b, views, dim) L2-normalised; keys[i, v] is the own key of queries[i, v].
    """
    shares = groups.shares(keys)
    losses = []
    for query, share in zip(queries.split([share.count for share in shares]), shares, strict=True):
        with torch.autocast(query.device.type, enabled=False):  # 8 bits of mantissa are too few for cosines over T
            logits = torch.einsum("ivd,jvd->vij", query, share.members) / temperature
        own = torch.arange(share.first, share.first + share.count, device=query.device).expand(len(logits), -1)
        rows = F.cross_entropy(logits.flatten(0, 1), own.flatten(), reduction="sum")
        losses.append(2.0 * temperature * rows / len(queries))
    return torch.stack(losses).sum()
