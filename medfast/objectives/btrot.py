"""BTROT: each token of one view predicts what a slowly moving copy makes of the same token of the other view.

Source: SimTROT, BYOL's loss token by token, and its public code. docs/papers/btrot.md maps it to functions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from medfast.objectives.byol import crossed_cosine
from medfast.objectives.contrast import by_sample, group_size, groups_of
from medfast.objectives.gauges import same_position
from medfast.objectives.losses import at_least_fp32
from medfast.objectives.options import momenta
from medfast.objectives.patches import Stride
from medfast.objectives.positions import position_tokens, shown, turns_of
from medfast.objectives.projectors import NormedMLP
from medfast.objectives.schedules import cosine
from medfast.objectives.views import grid_of, split_views
from medfast.types import Backbone, Batch, Masker, Objective, Output, Teacher


class BTROT(Objective):
    """cosine: 2 - 2 cos of each token's prediction with the other view's target at its position, both ways added.

    backbone, mask, cell, fill, restore: as in ``SimPROT``. group: samples that share batch statistics. hidden, width:
    of the projector and the predictor. momentum: first and last of the teacher's average, a cosine between them.
    """

    views = 2
    needs = frozenset({"rotation", "flip"})

    def __init__(
        self,
        backbone: Backbone,
        mask: Masker,
        cell: Stride = (4, 8, 8),
        fill: float = 0.1,
        group: int = 2,
        hidden: int = 1536,
        width: int = 256,
        momentum: Sequence[float] = (0.99, 0.99),
        restore: bool = True,
    ):
        super().__init__()
        if getattr(mask, "guided", False) or fill < 0.0:
            raise ValueError(
                "BTROT has no attention to guide a mask, and fill is at least 0: use the mask 'random', got "
                f"{type(mask).__name__}, {fill=}"
            )
        self.backbone, self.mask, self.cell, self.fill = backbone, mask, cell, fill
        self.group, self.restore, self.momenta = group_size(group), restore, momenta(momentum)
        self.projector = NormedMLP((backbone.channels[-1], hidden, width))
        self.predictor = NormedMLP((width, hidden, width))
        self.teacher = Teacher(self, "backbone", "projector")

    def forward(self, batch: Batch, t: Tensor) -> Output:
        turns, groups = turns_of(batch, self.restore), groups_of(self)
        volume, hidden, key = shown(batch, self.mask, self.cell, self.fill, self.training)
        seen = by_sample(position_tokens(self.backbone, volume, key, turns))
        prediction = self.predictor(self.projector(seen, groups), groups)
        teacher = self.teacher
        assert teacher is not None
        with torch.no_grad():
            target = teacher.projector(by_sample(position_tokens(teacher.backbone, volume, None, turns)), groups)
        gauges = {"mask_ratio": hidden.chunk(2)[1].to(torch.float32).mean()}
        if len(prediction) > 1:
            z = F.normalize(at_least_fp32(prediction), dim=-1)
            gauges["same_position"] = same_position(z.transpose(0, 1).flatten(0, 1))
        return Output({"cosine": crossed_cosine(prediction, target)}, gauges)

    def momentum(self, t: float) -> float:
        """EMA momentum of the teacher at time t of the whole run."""
        return cosine(*self.momenta, t)

    def cells(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """Cells of ``cell`` voxels that cover ``size``."""
        return grid_of(size, self.cell)

    @torch.no_grad()
    def picture(self, batch: Batch) -> dict[str, tuple[Tensor, ...]]:
        """Per view: "mask" (b, *size) bool, voxels that are noise."""
        return {"mask": split_views(shown(batch, self.mask, self.cell, self.fill, False)[1], self.views)}

    @torch.no_grad()
    def tokens(self, batch: Batch, t: float = 0.0) -> dict[str, Tensor]:
        """For collapse gauges: "student" and "teacher" (tokens, dim) of the last stage."""
        volume, _, _ = shown(batch, self.mask, self.cell, self.fill, False)
        teacher = self.teacher
        assert teacher is not None
        made = {"student": self.backbone, "teacher": teacher.backbone}
        return {name: backbone(volume).stages[-1].flatten(0, -2) for name, backbone in made.items()}
