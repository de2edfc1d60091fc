"""SimPROT and SimPROT-W: each token of a turned view finds itself, among all tokens, in a masked view of the same box.

Source: SimTROT, eqs. 1 and 3 as docs/papers/simprot.md reconstructs them, and its public code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from medfast.objectives.contrast import group_size, groups_of, token_contrast
from medfast.objectives.gauges import agreement, same_position
from medfast.objectives.options import one_of, positive
from medfast.objectives.patches import Stride
from medfast.objectives.positions import position_tokens, shown, turns_of
from medfast.objectives.projectors import Projector
from medfast.objectives.views import grid_of, split_views
from medfast.types import Backbone, Batch, Masker, Objective, Output


class SimPROT(Objective):
    """contrast: NT-Xent over the tokens of both views of all volumes of a group.

    backbone: its last stage's tokens are contrasted. mask: hides cells of the second view, not guided by attention;
    cell: their voxels, one number or one per axis; fill: deviation of the noise in them. group: samples contrasted with
    each other. weight, weight_mode: of tokens at the same position of other volumes, see
    ``medfast_kernels.token_contrast``; 1 with "exp" is SimPROT, 5 the paper's SimPROT-W. restore: features of a turned
    view are turned back; without, tokens meet at positions that are not theirs (the paper's ablation). relu_last: see
    ``Projector``.
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
        weight: float = 1.0,
        weight_mode: str = "exp",
        temperature: float = 0.5,
        restore: bool = True,
        relu_last: bool = False,
    ):
        super().__init__()
        one_of("weight_mode", weight_mode, ("exp", "logit"))
        if getattr(mask, "guided", False) or fill < 0.0 or weight < 0.0:
            raise ValueError(
                "SimPROT has no attention to guide a mask, and fill and weight are at least 0: use the mask 'random', "
                f"got {type(mask).__name__}, {fill=}, {weight=}"
            )
        self.backbone, self.mask, self.cell, self.fill = backbone, mask, cell, fill
        self.group, self.restore = group_size(group), restore
        self.weight, self.weight_mode = weight, weight_mode
        self.temperature = positive("temperature", temperature)
        self.projector = Projector(backbone.channels[-1], relu_last)

    def forward(self, batch: Batch, t: Tensor) -> Output:
        turns = turns_of(batch, self.restore)
        volume, hidden, key = shown(batch, self.mask, self.cell, self.fill, self.training)
        z = self.projector(position_tokens(self.backbone, volume, key, turns))
        loss = token_contrast(z, groups_of(self), self.temperature, self.weight, self.weight_mode, self._volumes(batch))
        gauges = {"agreement": agreement(z), "mask_ratio": hidden.chunk(2)[1].to(torch.float32).mean()}
        if len(z) > 2:
            gauges["same_position"] = same_position(z)
        return Output({"contrast": loss}, gauges)

    def cells(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """Cells of ``cell`` voxels that cover ``size``."""
        return grid_of(size, self.cell)

    def _volumes(self, batch: Batch) -> Tensor | None:
        """Which crops are of one volume, where that changes the loss."""
        if self.weight == (1.0 if self.weight_mode == "exp" else 0.0):
            return None
        if "volume" not in batch.params:
            raise ValueError("a weight between volumes needs Batch.params['volume'], which this batch lacks")
        return batch.params["volume"]

    @torch.no_grad()
    def picture(self, batch: Batch) -> dict[str, tuple[Tensor, ...]]:
        """Per view: "mask" (b, *size) bool, voxels that are noise."""
        return {"mask": split_views(shown(batch, self.mask, self.cell, self.fill, False)[1], self.views)}

    @torch.no_grad()
    def tokens(self, batch: Batch, t: float = 0.0) -> dict[str, Tensor]:
        """For collapse gauges: "student" (tokens, dim) of the last stage."""
        volume, _, _ = shown(batch, self.mask, self.cell, self.fill, False)
        return {"student": self.backbone(volume).stages[-1].flatten(0, -2)}
