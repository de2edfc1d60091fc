"""MST: the least attended cells are hidden; images are distilled across views and restored whole.

Inspired by Li et al., NeurIPS 2021, arXiv 2106.05656, of which no public code was found: docs/papers/mst.md says what
is theirs and what is ours. No parity is claimed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from medfast.objectives.distillation import Sides, Term, distil_image
from medfast.objectives.heads import ConvVoxels, Prototypes, Trunk
from medfast.objectives.losses import Centres, masked_l1
from medfast.objectives.masking import drawn_ahead, hidden_voxels
from medfast.objectives.options import chosen_weights, distilled_stage, momenta, positive, token_width
from medfast.objectives.schedules import Points, cosine, piecewise, points
from medfast.objectives.views import given_mask, grid_of, judged, split_views, stack_views
from medfast.types import Backbone, Batch, Features, Key, Mask, Masker, Objective, Output, Teacher

WEIGHTS = {"image": 1.0, "recon": 0.6}


class Look(NamedTuple):
    """One look of teacher and student at a batch; views stacked along the batch axis."""

    volume: Tensor
    taught: Features
    mask: Mask
    seen: Features


class MST(Objective):
    """image + recon: [CLS] of the masked student against the clean teacher's other view, and L1 on all voxels.

    backbone: with [CLS]. mask: AttentionMask(0.7, hint=0, order="low") hides the least attended. decoder: width of the
    decoder's first convolution; it reads the tokens that [CLS] attends to. image_temperature: the teacher's, a number
    or [t, value] points.
    """

    views = 2

    def __init__(
        self,
        backbone: Backbone,
        mask: Masker,
        decoder: int = 128,
        weights: Mapping[str, float] | None = None,
        prototypes: int = 8192,
        head_widths: tuple[int, ...] = (2048, 2048, 256),
        student_temperature: float = 0.1,
        image_temperature: float | Points = ((0.0, 0.04), (0.0375, 0.07)),
        momentum: tuple[float, float] = (0.996, 1.0),
        centre_momentum: float = 0.9,
    ):
        super().__init__()
        self.weights = chosen_weights(weights, WEIGHTS)
        if backbone.semantic_attention is None:
            raise ValueError(
                "MST distils [CLS], and this backbone has none: give it one (cls=true for vit, semantic_attention=3 "
                "for swin), or use the objective 'smit', which needs no [CLS]"
            )
        self.stage = distilled_stage(backbone, None)
        self.backbone, self.mask = backbone, mask
        self.student_temperature = positive("student_temperature", student_temperature)
        self.temperature, self.momenta = points(image_temperature), momenta(momentum)
        self.fill = nn.Parameter(torch.zeros(token_width(backbone)))
        width, stride = backbone.channels[self.stage], backbone.strides[self.stage]
        distils = "image" in self.weights
        self.centres = Centres(["image"] * distils, prototypes, centre_momentum)
        if distils:
            self.norm, self.trunk = nn.LayerNorm(width), Trunk(width, tuple(head_widths))
            self.image_last = Prototypes(head_widths[-1], prototypes)
        if "recon" in self.weights:
            self.decoder = ConvVoxels(width, stride, backbone.in_channels, decoder)
        self.teacher = Teacher(self, "backbone", *["norm", "trunk", "image_last"] * distils)

    def momentum(self, t: float) -> float:
        """Cosine .996 to 1 over the run, a function of the global step."""
        return cosine(*self.momenta, t)

    def absorb(self, sums: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        self.centres.absorb(sums)

    def forward(self, batch: Batch, t: Tensor) -> Output:
        look = self._look(batch, drop_path=self.training)
        losses, sums, gauges = {}, {}, {"mask_ratio": look.mask.where.to(torch.float32).mean()}
        if "image" in self.weights:
            term = self._distil(look, t)
            losses["image"], sums["image"], gauges["entropy_image"] = term.loss, term.sums, term.entropy
        if "recon" in self.weights:
            losses["recon"] = masked_l1(self._reconstruct(look), look.volume, judged(batch))
        return Output({name: self.weights[name] * loss for name, loss in losses.items()}, gauges, sums)

    def cells(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """A cell of the mask is one token that [CLS] attends to."""
        return grid_of(size, self.backbone.strides[self.stage])

    def ahead(self, size: tuple[int, ...]) -> dict[str, Callable[[Key], Tensor]]:
        return drawn_ahead(self.mask, self.cells(size))

    def _look(self, batch: Batch, drop_path: bool) -> Look:
        volume, key = stack_views(batch, self.views)
        cells, teacher = self.cells(tuple(volume.shape[2:])), self.teacher
        assert teacher is not None
        with torch.no_grad():
            taught = teacher.backbone(volume)
        mask = given_mask(batch, cells) or self.mask(cells, key, taught.attention)
        return Look(volume, taught, mask, self.backbone(volume, mask, self.fill, key if drop_path else None))

    def _distil(self, look: Look, t: Tensor) -> Term:
        teacher = self.teacher
        assert teacher is not None
        sides = self._sides(teacher, t)
        return distil_image(self._vectors(self, look.seen), self._vectors(teacher, look.taught), sides)

    def _sides(self, teacher: Teacher, t: Tensor) -> Sides:
        sharpen = partial(self.centres, "image", temperature=piecewise(self.temperature, t))
        return Sides(self.image_last, teacher.image_last, self.student_temperature, sharpen)

    @staticmethod
    def _vectors(side: MST | Teacher, features: Features) -> Tensor:
        return side.trunk(side.norm(features.summary))

    def _reconstruct(self, look: Look) -> Tensor:
        return self.decoder(look.seen.stages[self.stage], tuple(look.volume.shape[2:]))

    @torch.no_grad()
    def picture(self, batch: Batch) -> dict[str, tuple[Tensor, ...]]:
        """Per view: "mask" (b, *size) bool, voxels hidden from the student; "attention" (b, *cells) of the teacher;
        "reconstruction" (b, c, *size) fp32 where that loss is on."""
        look = self._look(batch, drop_path=False)
        shown = {"mask": hidden_voxels(look.mask, self.backbone.strides[self.stage], tuple(look.volume.shape[2:]))}
        if look.taught.attention is not None:
            shown["attention"] = look.taught.attention.unflatten(1, look.mask.where.shape[1:])
        if "recon" in self.weights:
            shown["reconstruction"] = self._reconstruct(look).float()
        return {name: split_views(x, self.views) for name, x in shown.items()}

    @torch.no_grad()
    def tokens(self, batch: Batch, t: float = 0.0) -> dict[str, Tensor]:
        """For collapse gauges: "student" and "teacher" (tokens, dim), [CLS] of each view; "prototypes" (rows, K), the
        teacher's distributions at time t where images are distilled."""
        look, teacher = self._look(batch, drop_path=False), self.teacher
        assert teacher is not None
        found = {"student": look.seen.summary, "teacher": look.taught.summary}
        if "image" in self.weights:
            sides = self._sides(teacher, torch.tensor(t))
            found["prototypes"] = sides.sharpen(sides.teacher(self._vectors(teacher, look.taught)))
        return found
