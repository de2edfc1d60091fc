"""BYOL: one view predicts what a slowly moving copy makes of the other; there are no negatives.

Source: Grill et al., NeurIPS 2020, arXiv 2006.07733, as SimTROT compares itself with it. docs/papers/byol.md maps it to
functions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from medfast.objectives.contrast import by_sample, group_size, groups_of
from medfast.objectives.gauges import agreement
from medfast.objectives.losses import at_least_fp32
from medfast.objectives.options import momenta, summary_width
from medfast.objectives.projectors import NormedMLP
from medfast.objectives.schedules import cosine
from medfast.objectives.views import stack_views
from medfast.types import Backbone, Batch, Objective, Output, Teacher


class BYOL(Objective):
    """cosine: 2 - 2 cos of each view's prediction with the other view's target, both ways added.

    group: samples that share batch statistics. hidden, width: of the projector and the predictor. momentum: first and
    last of the teacher's average, a cosine between them.
    """

    views = 2

    def __init__(
        self,
        backbone: Backbone,
        group: int = 2,
        hidden: int = 4096,
        width: int = 256,
        momentum: Sequence[float] = (0.99, 0.99),
    ):
        super().__init__()
        self.backbone, self.group, self.momenta = backbone, group_size(group), momenta(momentum)
        self.projector = NormedMLP((summary_width(backbone), hidden, width))
        self.predictor = NormedMLP((width, hidden, width))
        self.teacher = Teacher(self, "backbone", "projector")

    def forward(self, batch: Batch, t: Tensor) -> Output:
        volume, key = stack_views(batch, self.views)
        groups = groups_of(self)
        seen = by_sample(self.backbone(volume, key=key if self.training else None).summary)
        prediction = self.predictor(self.projector(seen, groups), groups)
        teacher = self.teacher
        assert teacher is not None
        with torch.no_grad():
            target = teacher.projector(by_sample(teacher.backbone(volume).summary), groups)
        unit = F.normalize(at_least_fp32(prediction), dim=-1)
        gauges = {"agreement": agreement(unit.transpose(0, 1).flatten(0, 1))}
        return Output({"cosine": crossed_cosine(prediction, target)}, gauges)

    def momentum(self, t: float) -> float:
        """EMA momentum of the teacher at time t of the whole run."""
        return cosine(*self.momenta, t)

    @torch.no_grad()
    def tokens(self, batch: Batch, t: float = 0.0) -> dict[str, Tensor]:
        """For collapse gauges: "student" and "teacher" (2 * b, dim), the summary vectors."""
        volume, teacher = stack_views(batch, self.views)[0], self.teacher
        assert teacher is not None
        return {"student": self.backbone(volume).summary, "teacher": teacher.backbone(volume).summary}


def crossed_cosine(prediction: Tensor, target: Tensor) -> Tensor:
    """2 - 2 cos of a prediction with the target of the other view, mean over samples and tokens, sum over views (BYOL,
    eq. 2 and the symmetric loss after it).

    prediction, target: (b, 2 views, ..., dim), of any length.
    """
    alike = F.cosine_similarity(at_least_fp32(prediction), at_least_fp32(target).flip(1), dim=-1, eps=1e-12)
    return 2 * (2.0 - 2.0 * alike).mean()
