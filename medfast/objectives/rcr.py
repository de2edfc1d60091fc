"""RCR: what was cut out is restored, how a view was turned is told, and views of a sample are told from other samples.

Source: Tang et al., CVPR 2022, arXiv 2111.14791 (Swin UNETR pretraining), and its public code. docs/papers/rcr.md maps
it to functions. The data pipeline turns the views, cuts boxes out of them and hands over what they were
(``medfast.data.orientation``, ``medfast.data.cutout``).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medfast.objectives.contrast import group_size, groups_of, nt_xent
from medfast.objectives.heads import Upsampler
from medfast.objectives.losses import at_least_fp32, masked_l1
from medfast.objectives.options import chosen_weights, one_of, positive
from medfast.objectives.views import judged, split_views, stack_views
from medfast.types import Backbone, Batch, Features, Objective, Output

WEIGHTS = {"recon": 1.0, "rotation": 1.0, "contrast": 1.0}


class RCR(Objective):
    """recon + rotation + contrast, read from the last stage of the backbone.

    backbone: its last stride is a power of two. group: samples that are contrasted with each other. read: what the
    rotation and contrast heads read, "mean", the mean token of the last stage, or "cells", its first and its second
    token (public code). weights: of the losses; those left out keep their default, 0 removes a loss and its head.
    contrast_width: of the contrasted vector.
    """

    views = 2

    def __init__(
        self,
        backbone: Backbone,
        group: int = 2,
        read: str = "mean",
        weights: Mapping[str, float] | None = None,
        contrast_width: int = 512,
        temperature: float = 0.5,
    ):
        super().__init__()
        self.weights = chosen_weights(weights, WEIGHTS)
        one_of("read", read, ("mean", "cells"))
        self.backbone, self.read = backbone, read
        self.group = group_size(group) if "contrast" in self.weights else 1
        self.temperature = positive("temperature", temperature)
        width = backbone.channels[-1]
        if "recon" in self.weights:
            self.decoder = Upsampler(width, backbone.strides[-1], backbone.in_channels)
        if "rotation" in self.weights:
            self.rotation = nn.Linear(width, 4)
        if "contrast" in self.weights:
            self.contrast = nn.Linear(width, contrast_width)
        needed = {"recon": "uncut", "rotation": "rotation"}
        self.needs = frozenset(needed[name] for name in self.weights if name in needed)

    def forward(self, batch: Batch, t: Tensor) -> Output:
        volume, key = stack_views(batch, self.views)
        seen = self.backbone(volume, key=key if self.training else None)
        losses, gauges = {}, {}
        if "recon" in self.weights:
            whole = torch.cat(tuple(planned(batch.targets, "uncut")))
            losses["recon"] = masked_l1(self._reconstruct(seen, volume), whole, judged(batch))
        if "rotation" in self.weights:
            told = self.rotation(view_vector(seen.stages[-1], self.read, 0))
            losses["rotation"], gauges["rotation_accuracy"] = rotation_loss(told, planned(batch.params, "rotation"))
        if "contrast" in self.weights:
            z = F.normalize(at_least_fp32(self.contrast(view_vector(seen.stages[-1], self.read, 1))), dim=-1)
            losses["contrast"] = nt_xent(z, groups_of(self), self.temperature)
        return Output({name: self.weights[name] * loss for name, loss in losses.items()}, gauges)

    def _reconstruct(self, seen: Features, volume: Tensor) -> Tensor:
        return self.decoder(seen.stages[-1], tuple(volume.shape[2:]))

    @torch.no_grad()
    def picture(self, batch: Batch) -> dict[str, tuple[Tensor, ...]]:
        """Per view: "mask" (b, *size) bool, voxels cut out; "reconstruction" (b, c, *size) fp32; {} without it."""
        if "recon" not in self.weights:
            return {}
        volume, _ = stack_views(batch, self.views)
        whole = torch.cat(tuple(planned(batch.targets, "uncut")))
        shown = {
            "mask": (volume != whole).any(dim=1),
            "reconstruction": self._reconstruct(self.backbone(volume), volume).float(),
        }
        return {name: split_views(x, self.views) for name, x in shown.items()}

    @torch.no_grad()
    def tokens(self, batch: Batch, t: float = 0.0) -> dict[str, Tensor]:
        """For collapse gauges: "student" (tokens, dim) of the last stage."""
        return {"student": self.backbone(stack_views(batch, self.views)[0]).stages[-1].flatten(0, -2)}


def rotation_loss(told: Tensor, turns: Tensor) -> tuple[Tensor, Tensor]:
    """(cross-entropy with how views were turned, mean over views; share of views that were told right).

    told: (views * b, 4) logits, view after view. turns: (b, views) int64, as the plan has them.
    """
    told, turns = at_least_fp32(told), turns.T.flatten()
    return F.cross_entropy(told, turns), (told.argmax(dim=1) == turns).to(torch.float32).mean()


def view_vector(tokens: Tensor, read: str, cell: int) -> Tensor:
    """(b, *grid, width) -> (b, width): the mean token for read="mean", else the one that has the number ``cell``."""
    tokens = tokens.flatten(1, -2)
    if read == "mean":
        return tokens.mean(dim=1)
    if tokens.shape[1] <= cell:
        raise ValueError('read="cells" takes two tokens of the last stage, and views of this size have one: use "mean"')
    return tokens[:, cell]


def planned(named: Mapping, name: str):
    """``named[name]``, which the data pipeline gives where it turns and cuts views; ValueError where it does not."""
    if name not in named:
        raise ValueError(
            f"the objective reads {name!r} of the batch, which is not there: set data.rotate=true and data.cutout=true"
        )
    return named[name]
