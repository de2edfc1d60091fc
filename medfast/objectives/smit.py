"""SMIT: self-distilled masked image modelling with random masks and a clean teacher.

Source: Jiang et al., MICCAI 2022, arXiv 2205.10342, and its public code. docs/papers/smit.md maps it to functions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from medfast.objectives.distillation import Sides, Term, distil_image, distil_patches, weighted
from medfast.objectives.heads import Prototypes, Trunk, Voxels
from medfast.objectives.losses import Centres, hidden_l1
from medfast.objectives.masking import drawn_ahead, hidden_rows, hidden_tokens, hidden_voxels
from medfast.objectives.options import chosen_weights, momenta, positive, token_width
from medfast.objectives.schedules import Points, cosine, piecewise, points
from medfast.objectives.views import given_mask, grid_of, split_views, stack_valid, stack_views
from medfast.types import Backbone, Batch, Features, Key, Mask, Masker, Objective, Output, Teacher

WEIGHTS = {"recon": 1.0, "patch": 0.1, "image": 0.1}


class Look(NamedTuple):
    """One look of teacher and student at a batch; views stacked along the batch axis."""

    volume: Tensor
    taught: Features | None
    mask: Mask
    seen: Features


class SMIT(Objective):
    """recon + patch + image: L1 on hidden voxels, and two distillations of the tokens of one stage.

    backbone: without [CLS], which nothing here would train. mask: not guided by attention, e.g. RandomMask(0.7).
    weights: of the losses; those left out keep their default, 0 removes a loss and its head. stage: whose tokens are
    distilled, from 1; a cell of the mask is one of them, the image token is their mean. image_temperature,
    patch_temperature: the teacher's, a number or [t, value] points (30 of 500 epochs are t = 0.06).
    """

    views = 2

    def __init__(
        self,
        backbone: Backbone,
        mask: Masker,
        weights: Mapping[str, float] | None = None,
        stage: int = 3,
        prototypes: int = 8192,
        head_widths: tuple[int, ...] = (2048, 2048, 256),
        student_temperature: float = 0.1,
        image_temperature: float | Points = ((0.0, 0.04), (0.06, 0.07)),
        patch_temperature: float | Points = ((0.06, 0.04), (0.12, 0.07)),
        momentum: tuple[float, float] = (0.996, 1.0),
        centre_momentum: float = 0.9,
    ):
        super().__init__()
        self.weights = chosen_weights(weights, WEIGHTS)
        if not 1 <= stage <= len(backbone.strides):
            raise ValueError(f"stage must be one of 1..{len(backbone.strides)}, got {stage}")
        if getattr(mask, "guided", False) or backbone.semantic_attention is not None:
            raise ValueError(
                "SMIT trains no [CLS] token, so it takes no mask that attention guides and no backbone with "
                "semantic_attention: use the mask 'random' and semantic_attention=null, or the objective 'smart'"
            )
        self.stage = stage - 1
        self.backbone, self.mask = backbone, mask
        self.student_temperature = positive("student_temperature", student_temperature)
        self.temperatures = {"image": points(image_temperature), "patch": points(patch_temperature)}
        self.momenta = momenta(momentum)
        self.fill = nn.Parameter(torch.zeros(token_width(backbone)))
        distilled = [name for name in self.weights if name != "recon"]
        self.centres = Centres(distilled, prototypes, centre_momentum)
        self.head_trunk = nn.ModuleDict({name: Trunk(backbone.channels[self.stage], head_widths) for name in distilled})
        self.head_last = nn.ModuleDict({name: Prototypes(head_widths[-1], prototypes) for name in distilled})
        if distilled:
            self.norm = nn.LayerNorm(backbone.channels[self.stage])
            self.teacher = Teacher(self, "backbone", "norm", "head_trunk", "head_last")
        if "recon" in self.weights:
            self.voxels = Voxels(backbone.channels[-1], backbone.strides[-1], backbone.in_channels)

    def momentum(self, t: float) -> float:
        """Cosine .996 to 1 over the run; the public code's index restarts with every epoch, this one does not."""
        return cosine(*self.momenta, t)

    def absorb(self, sums: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        self.centres.absorb(sums)

    def forward(self, batch: Batch, t: Tensor) -> Output:
        look = self._look(batch, drop_path=self.training)
        losses, terms = {}, self._distil(look, t)
        if "recon" in self.weights:
            stride = self.backbone.strides[self.stage]
            losses["recon"] = hidden_l1(self._reconstruct(look), look.volume, look.mask, stride, stack_valid(batch))
        losses |= {name: term.loss for name, term in terms.items()}
        return weighted(self.weights, losses, terms, look.mask)

    def cells(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """A cell of the mask is one token of the distilled stage."""
        return grid_of(size, self.backbone.strides[self.stage])

    def ahead(self, size: tuple[int, ...]) -> dict[str, Callable[[Key], Tensor]]:
        return drawn_ahead(self.mask, self.cells(size))

    def _look(self, batch: Batch, drop_path: bool) -> Look:
        volume, key = stack_views(batch, self.views)
        cells = self.cells(tuple(volume.shape[2:]))
        taught = None
        if self.teacher is not None:
            with torch.no_grad():
                taught = self.teacher.backbone(volume)
        mask = given_mask(batch, cells) or self.mask(cells, key)
        return Look(volume, taught, mask, self.backbone(volume, mask, self.fill, key if drop_path else None))

    def _distil(self, look: Look, t: Tensor) -> dict[str, Term]:
        teacher, terms = self.teacher, {}
        if teacher is None or look.taught is None:
            return terms
        seen, taught = self._tokens(self, look.seen), self._tokens(teacher, look.taught)
        for name in self.centres.names:
            trunk, teacher_trunk, sides = self.head_trunk[name], teacher.head_trunk[name], self._sides(name, teacher, t)
            if name == "patch":
                hidden = hidden_tokens(seen, look.mask)[0]
                terms[name] = distil_patches(trunk(hidden), teacher_trunk(taught), look.mask, sides)
            else:
                terms[name] = distil_image(trunk(seen.mean(dim=1)), teacher_trunk(taught.mean(dim=1)), sides)
        return terms

    def _sides(self, name: str, teacher: Teacher, t: Tensor) -> Sides:
        sharpen = partial(self.centres, name, temperature=piecewise(self.temperatures[name], t))
        return Sides(self.head_last[name], teacher.head_last[name], self.student_temperature, sharpen)

    def _tokens(self, side: SMIT | Teacher, features: Features) -> Tensor:
        """Normalised tokens of the distilled stage, (2 b, n, width)."""
        return side.norm(features.stages[self.stage]).flatten(1, -2)

    def _hidden_voxels(self, look: Look) -> Tensor:
        return hidden_voxels(look.mask, self.backbone.strides[self.stage], look.volume.shape[2:])

    def _reconstruct(self, look: Look) -> Tensor:
        return self.voxels(look.seen.stages[-1], look.volume.shape[2:])

    @torch.no_grad()
    def picture(self, batch: Batch) -> dict[str, tuple[Tensor, ...]]:
        """One tensor per view, with the masks that ``forward`` has on this batch: "mask" (b, *size) bool, voxels hidden
        from the student; "reconstruction" (b, c, *size) fp32 where that loss is on."""
        look = self._look(batch, drop_path=False)
        shown = {"mask": self._hidden_voxels(look)}
        if "recon" in self.weights:
            shown["reconstruction"] = self._reconstruct(look).float()
        return {name: split_views(x, self.views) for name, x in shown.items()}

    @torch.no_grad()
    def tokens(self, batch: Batch, t: float = 0.0) -> dict[str, Tensor]:
        """For collapse gauges: "student" and "teacher" (tokens, dim), stage tokens at hidden cells; "prototypes"
        (rows, K), the teacher's distributions at time t, of patches, with "crops", where they are distilled, else of
        images."""
        look, teacher = self._look(batch, drop_path=False), self.teacher
        if teacher is None or look.taught is None:
            return {"student": look.seen.stages[self.stage].flatten(0, -2)}
        found = {"student": hidden_rows(self._tokens(self, look.seen), look.mask)[0]}
        found["teacher"], crops = hidden_rows(self._tokens(teacher, look.taught), look.mask)
        name = self.centres.names[0]
        if name == "patch":
            rows, found["crops"] = found["teacher"], crops
        else:
            rows = self._tokens(teacher, look.taught).mean(dim=1)
        sides = self._sides(name, teacher, torch.tensor(t))
        found["prototypes"] = sides.sharpen(sides.teacher(teacher.head_trunk[name](rows)))
        return found
