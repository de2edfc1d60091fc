"""SimCLR: the two views of a sample are told from those of the other samples of its group.

Source: Chen et al., ICML 2020, arXiv 2002.05709, as SimTROT compares itself with it. docs/papers/simclr.md maps it to
functions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from medfast.objectives.contrast import group_size, groups_of, nt_xent
from medfast.objectives.gauges import agreement
from medfast.objectives.options import positive, summary_width
from medfast.objectives.projectors import Projector
from medfast.objectives.views import stack_views
from medfast.types import Backbone, Batch, Objective, Output


class SimCLR(Objective):
    """contrast: NT-Xent of the backbone's summary vectors.

    group: samples that are contrasted with each other. relu_last: see ``Projector``.
    """

    views = 2

    def __init__(self, backbone: Backbone, group: int = 2, temperature: float = 0.5, relu_last: bool = False):
        super().__init__()
        self.backbone, self.group = backbone, group_size(group)
        self.temperature = positive("temperature", temperature)
        self.projector = Projector(summary_width(backbone), relu_last)

    def forward(self, batch: Batch, t: Tensor) -> Output:
        volume, key = stack_views(batch, self.views)
        z = self.projector(self.backbone(volume, key=key if self.training else None).summary)
        return Output({"contrast": nt_xent(z, groups_of(self), self.temperature)}, {"agreement": agreement(z)})

    @torch.no_grad()
    def tokens(self, batch: Batch, t: float = 0.0) -> dict[str, Tensor]:
        """For collapse gauges: "student" (2 * b, dim), the summary vectors."""
        return {"student": self.backbone(stack_views(batch, self.views)[0]).summary}
