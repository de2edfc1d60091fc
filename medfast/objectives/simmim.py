"""SimMIM: hidden cells are replaced by a token, and one linear layer predicts their voxels.

Source: Xie et al., CVPR 2022, arXiv 2111.09886, and its public code. docs/papers/simmim.md maps it to functions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from medfast.objectives.heads import Voxels
from medfast.objectives.losses import hidden_l1
from medfast.objectives.masking import drawn_ahead, hidden_rows, hidden_voxels
from medfast.objectives.options import distilled_stage, token_width
from medfast.objectives.views import given_mask, grid_of, split_views, stack_valid, stack_views
from medfast.types import Backbone, Batch, Features, Key, Mask, Masker, Objective, Output


class Look(NamedTuple):
    """volume (b, c, *size), its mask, and what the backbone made of what it was shown."""

    volume: Tensor
    mask: Mask
    seen: Features


class SimMIM(Objective):
    """recon: L1 on hidden voxels, sum over count, mean over channels and samples.

    backbone: without [CLS], which nothing here would train. mask: not guided by attention, e.g. RandomMask(0.6).
    stage: whose token is a cell of the mask, from 1; None: the third, or the last of fewer (8 patches of a Swin, the
    patch of a ViT). The prediction is read from the last stage.
    """

    views = 1

    def __init__(self, backbone: Backbone, mask: Masker, stage: int | None = None):
        super().__init__()
        if getattr(mask, "guided", False) or backbone.semantic_attention is not None:
            raise ValueError(
                "SimMIM has no teacher and trains no [CLS] token, so it takes no mask that attention guides and no "
                "backbone with [CLS]: use the mask 'random' and semantic_attention=null (swin) or cls=false (vit)"
            )
        self.backbone, self.mask = backbone, mask
        self.stride = backbone.strides[distilled_stage(backbone, stage)]
        self.fill = nn.Parameter(nn.init.trunc_normal_(torch.empty(token_width(backbone)), std=0.02))
        self.voxels = Voxels(backbone.channels[-1], backbone.strides[-1], backbone.in_channels)

    def forward(self, batch: Batch, t: Tensor) -> Output:
        look = self._look(batch, drop_path=self.training)
        loss = hidden_l1(self._reconstruct(look), look.volume, look.mask, self.stride, stack_valid(batch))
        gauges = {"mask_ratio": look.mask.where.to(torch.float32).mean()}
        return Output({"recon": loss}, gauges)

    def cells(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """A cell of the mask is one token of ``stage``."""
        return grid_of(size, self.stride)

    def ahead(self, size: tuple[int, ...]) -> dict[str, Callable[[Key], Tensor]]:
        return drawn_ahead(self.mask, self.cells(size))

    def _look(self, batch: Batch, drop_path: bool) -> Look:
        volume, key = stack_views(batch, self.views)
        cells = self.cells(tuple(volume.shape[2:]))
        mask = given_mask(batch, cells) or self.mask(cells, key)
        return Look(volume, mask, self.backbone(volume, mask, self.fill, key if drop_path else None))

    def _hidden_voxels(self, look: Look) -> Tensor:
        return hidden_voxels(look.mask, self.stride, tuple(look.volume.shape[2:]))

    def _reconstruct(self, look: Look) -> Tensor:
        return self.voxels(look.seen.stages[-1], tuple(look.volume.shape[2:]))

    @torch.no_grad()
    def picture(self, batch: Batch) -> dict[str, tuple[Tensor, ...]]:
        """Per view: "mask" (b, *size) bool, voxels hidden; "reconstruction" (b, c, *size) fp32."""
        look = self._look(batch, drop_path=False)
        shown = {"mask": self._hidden_voxels(look), "reconstruction": self._reconstruct(look).float()}
        return {name: split_views(x, self.views) for name, x in shown.items()}

    @torch.no_grad()
    def tokens(self, batch: Batch, t: float = 0.0) -> dict[str, Tensor]:
        """For collapse gauges: "student" (tokens, dim) of the last stage; hidden ones where its tokens are cells."""
        look = self._look(batch, drop_path=False)
        tokens = look.seen.stages[-1].flatten(1, -2)
        if self.stride != self.backbone.strides[-1]:
            return {"student": tokens.flatten(0, 1)}
        return {"student": hidden_rows(tokens, look.mask)[0]}
