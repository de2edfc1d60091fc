"""SwinFUSE: RCR's three tasks on two views that meet in the backbone, and densities of its branches driven apart.

Source: Talasila et al., SwinFUSE, arXiv 2405.12963. docs/papers/swinfuse.md maps it to functions; its public code has
neither the meeting of views nor the densities.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import medfast_kernels as mk
from medfast.objectives.contrast import group_size, groups_of, nt_xent
from medfast.objectives.density import jensen_shannon
from medfast.objectives.heads import Upsampler
from medfast.objectives.losses import at_least_fp32, masked_l1
from medfast.objectives.options import chosen_weights, one_of, positive
from medfast.objectives.rcr import planned, rotation_loss, view_vector
from medfast.objectives.views import judged, split_views, stack_views
from medfast.types import Batch, EncodesPairs, Features, Key, Objective, Output

WEIGHTS = {"recon": 1.0, "rotation": 1.0, "contrast": 1.0, "divergence": 1.0}
_ROWS = 17  # layer of the role MASK for the rows whose densities are compared


class SwinFUSE(Objective):
    """recon + rotation + contrast + divergence; each view is judged by what the backbone made of it, never by a mean.

    backbone: one in which two views meet (encode_pair), and whose features say "dim"; its last stride is a power of
    two. rows: of each branch's output that the densities are made of, drawn anew for every sample and view. The rest is
    as in ``RCR``; weights has "divergence" beside.
    """

    views = 2

    def __init__(
        self,
        backbone: EncodesPairs,
        group: int = 2,
        read: str = "mean",
        weights: Mapping[str, float] | None = None,
        contrast_width: int = 512,
        temperature: float = 0.5,
        rows: int = 256,
    ):
        super().__init__()
        if not isinstance(backbone, EncodesPairs):
            raise ValueError(
                f"SwinFUSE needs a backbone in which two views meet (encode_pair), {type(backbone).__name__} has none: "
                "use the backbone 'swinfuse', or the objective 'rcr', which encodes each view by itself"
            )
        one_of("read", read, ("mean", "cells"))
        if rows < 2:
            raise ValueError(f"rows must be at least 2, for a point's density is that of the others, got {rows}")
        self.weights, self.temperature = chosen_weights(weights, WEIGHTS), positive("temperature", temperature)
        self.backbone, self.read, self.rows = backbone, read, rows
        self.group = group_size(group) if "contrast" in self.weights else 1
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
        key = stack_views(batch, self.views)[1]
        pair = self._pair(batch, drop_path=self.training)
        last = torch.cat([features.stages[-1] for features in pair])
        losses, gauges = {}, {}
        if "recon" in self.weights:
            whole = torch.cat(tuple(planned(batch.targets, "uncut")))
            losses["recon"] = masked_l1(self.decoder(last, tuple(whole.shape[2:])), whole, judged(batch))
        if "rotation" in self.weights:
            told = self.rotation(view_vector(last, self.read, 0))
            losses["rotation"], gauges["rotation_accuracy"] = rotation_loss(told, planned(batch.params, "rotation"))
        if "contrast" in self.weights:
            z = F.normalize(at_least_fp32(self.contrast(view_vector(last, self.read, 1))), dim=-1)
            losses["contrast"] = nt_xent(z, groups_of(self), self.temperature)
        if "divergence" in self.weights:
            losses["divergence"] = -jensen_shannon(*self._points(pair, key)).mean()
        return Output({name: self.weights[name] * loss for name, loss in losses.items()}, gauges)

    def _pair(self, batch: Batch, drop_path: bool) -> tuple[Features, Features]:
        one, other = batch.views
        return self.backbone.encode_pair(one, other, batch.key if drop_path else None)

    def _points(self, pair: tuple[Features, Features], key: Key) -> list[Tensor]:
        """Of each view, (b, rows, width) of what its branch put out."""
        found = torch.cat([at_least_fp32(_dim(features)) for features in pair])
        n = found.shape[1]
        ids = mk.random_ids(n, min(self.rows, n), key=key.at(mk.Role.MASK, layer=_ROWS), device=found.device)
        return list(found.gather(1, ids.unsqueeze(-1).expand(-1, -1, found.shape[-1])).chunk(2))

    @torch.no_grad()
    def picture(self, batch: Batch) -> dict[str, tuple[Tensor, ...]]:
        """Per view: "mask" (b, *size) bool, voxels cut out; "reconstruction" (b, c, *size) fp32; {} without it."""
        if "recon" not in self.weights:
            return {}
        volume, _ = stack_views(batch, self.views)
        whole = torch.cat(tuple(planned(batch.targets, "uncut")))
        last = torch.cat([features.stages[-1] for features in self._pair(batch, drop_path=False)])
        shown = {
            "mask": (volume != whole).any(dim=1),
            "reconstruction": self.decoder(last, tuple(volume.shape[2:])).float(),
        }
        return {name: split_views(x, self.views) for name, x in shown.items()}

    @torch.no_grad()
    def tokens(self, batch: Batch, t: float = 0.0) -> dict[str, Tensor]:
        """For collapse gauges: "student" (tokens, dim) of the last stage."""
        pair = self._pair(batch, drop_path=False)
        return {"student": torch.cat([features.stages[-1] for features in pair]).flatten(0, -2)}


def _dim(features: Features) -> Tensor:
    found = features.extra.get("dim")
    if not isinstance(found, Tensor):
        raise ValueError("the backbone's features must say what each branch put out, extra['dim'], and do not")
    return found
