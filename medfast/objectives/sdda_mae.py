"""SDDA-MAE: hidden cells of an image are filled in by encoder and decoder, and the encoder learns from the decoder.

Source: SDDA-MAE, which has no public code; what it leaves open is decided in docs/papers/sdda_mae.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from medfast.objectives.heads import Voxels
from medfast.objectives.losses import at_least_fp32, cross_entropy, hidden_mse
from medfast.objectives.masking import hidden_voxels
from medfast.objectives.options import chosen_weights, positive, token_width
from medfast.objectives.views import given_mask, grid_of, stack_valid, stack_views
from medfast.types import Batch, Features, Mask, Masker, Network, Objective, Output

WEIGHTS = {"recon": 1.0, "distil": 1.0}


class Look(NamedTuple):
    """image (b, c, h, w), its mask, what the network made of what it was shown, and its decoder's map (b, *grid, w)."""

    image: Tensor
    mask: Mask
    seen: Features
    decoded: Tensor


class SDDAMAE(Objective):
    """recon: squared error on hidden pixels. distil: cross-entropy of the encoder's vector with the decoder's.

    backbone: a network of images whose features have "decoder", a map on the grid of the encoder's first stage and of
    its width. mask: not guided, RandomMask(0.6) is the paper's; cell: its pixels per axis. classes: entries of the
    distilled vectors; temperature: of both. weights: of the losses, 0 removes one. The decoder's vector comes through a
    linear layer that stays as it was drawn: no gradient goes to the teacher's side. Views of one slice, (b, c, 1, h,
    w), are images too.
    """

    views = 1

    def __init__(
        self,
        backbone: Network,
        mask: Masker,
        cell: int = 16,
        classes: int = 256,
        temperature: float = 1.0,
        weights: Mapping[str, float] | None = None,
    ):
        super().__init__()
        if not hasattr(backbone, "features") or not hasattr(backbone, "encoder") or getattr(mask, "guided", False):
            raise ValueError(
                "SDDA-MAE needs a network with a decoder (features) and a mask that no attention guides, got "
                f"{type(backbone).__name__} and {type(mask).__name__}: use the architecture 'dae_former' and the mask "
                "'random'"
            )
        self.backbone, self.mask, self.cell = backbone, mask, cell
        self.weights, self.temperature = chosen_weights(weights, WEIGHTS), positive("temperature", temperature)
        encoder = backbone.encoder
        width = encoder.channels[0]
        self.fill = nn.Parameter(nn.init.trunc_normal_(torch.empty(token_width(encoder)), std=0.02))
        if "recon" in self.weights:
            self.pixels = Voxels(width, encoder.strides[0], encoder.in_channels, axes=2)
        if "distil" in self.weights:
            self.student = nn.Linear(encoder.channels[-1], classes)
            self.target = nn.Linear(width, classes).requires_grad_(False)

    def forward(self, batch: Batch, t: Tensor) -> Output:
        look = self._look(batch, drop_path=self.training)
        losses = {}
        if "recon" in self.weights:
            losses["recon"] = hidden_mse(
                self._painted(look), look.image, look.mask, self.cell, stack_valid(_flat(batch))
            )  # fmt: skip
        if "distil" in self.weights:
            student = self.student(look.seen.stages[-1].mean(dim=(1, 2)))
            target = self.target(look.decoded.detach().mean(dim=(1, 2)))
            target = (at_least_fp32(target) / self.temperature).softmax(dim=-1)
            losses["distil"] = cross_entropy(student, target, self.temperature).mean()
        gauges = {"mask_ratio": look.mask.where.to(torch.float32).mean()}
        return Output({name: self.weights[name] * loss for name, loss in losses.items()}, gauges)

    def cells(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """Cells of ``cell`` pixels on the last two axes."""
        return grid_of(size[-2:], self.cell)

    def encode(self, batch: Batch) -> list[Features]:
        return [self.backbone.encoder(image) for image in _flat(batch).views]

    def _look(self, batch: Batch, drop_path: bool) -> Look:
        flat = _flat(batch)
        image, key = stack_views(flat, self.views)
        cells = self.cells(tuple(image.shape[2:]))
        mask = given_mask(flat, cells) or self.mask(cells, key)
        seen = self.backbone.features(image, mask, self.fill, key if drop_path else None)
        decoded, first = seen.extra.get("decoder"), tuple(seen.stages[0].shape)
        if not isinstance(decoded, Tensor) or tuple(decoded.shape) != first:
            given = tuple(decoded.shape) if isinstance(decoded, Tensor) else "none"
            raise ValueError(
                f"the network's extra['decoder'] must be a map as its encoder's first stage, {first}: {given}"
            )
        return Look(image, mask, seen, decoded)

    def _hidden(self, look: Look) -> Tensor:
        return hidden_voxels(look.mask, self.cell, tuple(look.image.shape[2:]))

    def _painted(self, look: Look) -> Tensor:
        return self.pixels(look.decoded, tuple(look.image.shape[2:]))

    @torch.no_grad()
    def picture(self, batch: Batch) -> dict[str, tuple[Tensor, ...]]:
        """ "mask" (b, *size) bool, pixels hidden; "reconstruction" (b, c, *size) fp32; of the view's own axes."""
        look = self._look(batch, drop_path=False)
        shape = batch.views[0].shape
        shown = {"mask": (self._hidden(look).reshape(shape[:1] + shape[2:]),)}
        if "recon" in self.weights:
            shown["reconstruction"] = (self._painted(look).float().reshape(shape),)
        return shown

    @torch.no_grad()
    def tokens(self, batch: Batch, t: float = 0.0) -> dict[str, Tensor]:
        """For collapse gauges: "student" (tokens, dim) of the encoder's last stage."""
        return {"student": self._look(batch, drop_path=False).seen.stages[-1].flatten(0, -2)}


def _flat(batch: Batch) -> Batch:
    """The batch with views and marks of one slice as images. ValueError for more slices."""
    shapes = [tuple(view.shape) for view in batch.views]
    if any(len(shape) != 4 and shape[2:-2] != (1,) for shape in shapes):
        raise ValueError(f"this objective takes images or single slices, got {shapes}: set data.size to [1, h, w]")
    valid = tuple(None if x is None or x.dim() == 3 else x.squeeze(1) for x in batch.valid)
    return replace(batch, views=tuple(x if x.dim() == 4 else x.squeeze(2) for x in batch.views), valid=valid)
