"""iBOT: distillation of hidden tokens and of image tokens, without reconstruction; and its marriage with SMART.

Sources: Zhou et al., ICLR 2022, arXiv 2111.07832, and its public code; SMART, table VI. docs/papers/ibot.md and
docs/papers/ibot_smart.md map them to functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

import medfast_kernels as mk
from medfast.objectives.distillation import Sides, Term, distil_image, distil_patches, weighted
from medfast.objectives.heads import Prototypes, Trunk
from medfast.objectives.losses import Centres
from medfast.objectives.masking import (
    count_of,
    drawn_ahead,
    hidden_rows,
    hidden_tokens,
    hidden_voxels,
    random_cells,
    share,
)
from medfast.objectives.options import chosen_weights, distilled_stage, momenta, one_of, positive, setting, token_width
from medfast.objectives.schedules import Points, cosine, piecewise, points
from medfast.objectives.views import given_mask, grid_of, split_views, stack_views
from medfast.types import Backbone, Batch, Features, Key, Mask, Masker, Objective, Output, Teacher

WEIGHTS = {"patch": 1.0, "image": 1.0}


class Look(NamedTuple):
    """One look of teacher and student at a batch; views stacked along the batch axis."""

    volume: Tensor
    taught: Features
    mask: Mask
    seen: Features


class IBOT(Objective):
    """patch + image: hidden tokens against the same view, image tokens against the other view.

    backbone: with [CLS], or without where neither ``image`` nor ``mask`` asks for it. mask: e.g. BlockMask(0.3), whose
    draws the data pipeline makes ahead, or AttentionMask, guided by the teacher. image: tokens that stand for an image,
    of "cls" and "pool", the mean of the last stage; the loss is their mean. None: [CLS] where there is one. stage:
    whose tokens are distilled, from 1; None: where [CLS] attends, else the third, or the last of fewer. heads:
    "shared", one last layer for images and patches, or "separate". teacher_drop: share of cells hidden from the
    teacher, at random. Temperatures: the teacher's, a number or [t, value] points (30 of 800 epochs are t = 0.0375).
    """

    views = 2

    def __init__(
        self,
        backbone: Backbone,
        mask: Masker,
        image: Sequence[str] | None = None,
        stage: int | None = None,
        heads: str = "shared",
        teacher_drop: float = 0.0,
        weights: Mapping[str, float] | None = None,
        prototypes: int = 8192,
        head_widths: tuple[int, ...] = (2048, 2048, 256),
        student_temperature: float = 0.1,
        image_temperature: float | Points = ((0.0, 0.04), (0.0375, 0.07)),
        patch_temperature: float | Points = ((0.0, 0.04), (0.0375, 0.07)),
        momentum: tuple[float, float] = (0.996, 1.0),
        centre_momentum: float = 0.9,
    ):
        super().__init__()
        self.weights = chosen_weights(weights, WEIGHTS)
        one_of("heads", heads, ("shared", "separate"))
        self.stage = distilled_stage(backbone, stage)
        self.image = self._image_tokens(backbone, mask, image)
        self.backbone, self.mask, self.teacher_drop = backbone, mask, share("teacher_drop", teacher_drop)
        self.student_temperature = positive("student_temperature", student_temperature)
        self.temperatures = {"image": points(image_temperature), "patch": points(patch_temperature)}
        self.momenta = momenta(momentum)
        self.fill = nn.Parameter(torch.zeros(token_width(backbone)))
        self._build_heads(heads == "shared", prototypes, tuple(head_widths), centre_momentum)
        parts = ("backbone", "norm", "trunk", "norm_pool", "trunk_pool", "image_last", "patch_last")
        self.teacher = Teacher(self, *(p for p in parts if hasattr(self, p)), *["fill"] * bool(teacher_drop))

    def _image_tokens(self, backbone: Backbone, mask: Masker, image: Sequence[str] | None) -> tuple[str, ...]:
        """Names of the image tokens. ValueError where there is no [CLS] and something asks for it."""
        attended = backbone.semantic_attention is not None
        chosen = tuple(("cls" if attended else "pool",) if image is None else image) if "image" in self.weights else ()
        for name in chosen:
            one_of("image", name, ("cls", "pool"))
        if not attended and ("cls" in chosen or getattr(mask, "guided", False)):
            asks = "the mask is guided by its attention" if getattr(mask, "guided", False) else "image names it"
            raise ValueError(
                f"this backbone has no [CLS] token and {asks}: give it one (semantic_attention=3 for swin, cls=true "
                "for vit), or use the mask 'block' and image [pool]"
            )
        return chosen

    def _build_heads(self, shared: bool, prototypes: int, widths: tuple[int, ...], centre_momentum: float) -> None:
        """Only what some loss trains. Tokens of one width share a trunk; another last stage has its own."""
        channels, patch = self.backbone.channels, "patch" in self.weights
        self.pools_apart = "pool" in self.image and self.stage != len(channels) - 1
        if patch or "cls" in self.image or ("pool" in self.image and not self.pools_apart):
            self.norm, self.trunk = nn.LayerNorm(channels[self.stage]), Trunk(channels[self.stage], widths)
        if self.pools_apart:
            self.norm_pool, self.trunk_pool = nn.LayerNorm(channels[-1]), Trunk(channels[-1], widths)
        if self.image:
            self.image_last = Prototypes(widths[-1], prototypes)
        self.patch_layer = "image_last" if shared and self.image else "patch_last"
        if patch and self.patch_layer == "patch_last":
            self.patch_last = Prototypes(widths[-1], prototypes)
        self.centres = Centres([*self.image, *["patch"] * patch], prototypes, centre_momentum)

    def momentum(self, t: float) -> float:
        """Cosine from the first to the last momentum over the run, a function of the global step."""
        return cosine(*self.momenta, t)

    def absorb(self, sums: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        self.centres.absorb(sums)

    def forward(self, batch: Batch, t: Tensor) -> Output:
        look = self._look(batch, drop_path=self.training)
        terms = {name: self._term(name, look, t) for name in self.centres.names}
        losses = {}
        if "patch" in terms:
            losses["patch"] = terms["patch"].loss
        if self.image:
            losses["image"] = torch.stack([terms[name].loss for name in self.image]).mean()
        return weighted(self.weights, losses, terms, look.mask)

    def cells(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """A cell of the mask is one token of the distilled stage."""
        return grid_of(size, self.backbone.strides[self.stage])

    def ahead(self, size: tuple[int, ...]) -> dict[str, Callable[[Key], Tensor]]:
        return drawn_ahead(self.mask, self.cells(size))

    def _look(self, batch: Batch, drop_path: bool) -> Look:
        """The teacher looks at clean views, or with ``teacher_drop`` at noisy ones; the student at masked ones."""
        volume, key = stack_views(batch, self.views)
        cells, teacher = self.cells(tuple(volume.shape[2:])), self.teacher
        assert teacher is not None
        with torch.no_grad():
            if self.teacher_drop:
                count = count_of(self.teacher_drop, math.prod(cells))
                drop = random_cells(cells, count, key.at(mk.Role.TEACHER_DROP))
                taught = teacher.backbone(volume, drop, teacher.fill)
            else:
                taught = teacher.backbone(volume)
        mask = given_mask(batch, cells) or self.mask(cells, key, taught.attention)
        return Look(volume, taught, mask, self.backbone(volume, mask, self.fill, key if drop_path else None))

    def _term(self, name: str, look: Look, t: Tensor) -> Term:
        teacher = self.teacher
        assert teacher is not None
        sides = self._sides(name, teacher, t)
        if name != "patch":
            return distil_image(self._vectors(self, name, look.seen), self._vectors(teacher, name, look.taught), sides)
        student = hidden_tokens(self._tokens(self, look.seen), look.mask)[0]
        return distil_patches(self.trunk(student), teacher.trunk(self._tokens(teacher, look.taught)), look.mask, sides)

    def _sides(self, name: str, teacher: Teacher, t: Tensor) -> Sides:
        layer = self.patch_layer if name == "patch" else "image_last"
        temperature = piecewise(self.temperatures["patch" if name == "patch" else "image"], t)
        sharpen = partial(self.centres, name, temperature=temperature)
        return Sides(getattr(self, layer), getattr(teacher, layer), self.student_temperature, sharpen)

    def _tokens(self, side: IBOT | Teacher, features: Features) -> Tensor:
        """Normalised tokens of the distilled stage, (2 b, n, c)."""
        return side.norm(features.stages[self.stage]).flatten(1, -2)

    def _vectors(self, side: IBOT | Teacher, name: str, features: Features) -> Tensor:
        """Normalised image tokens, (2 b, width)."""
        if name == "cls":
            return side.trunk(side.norm(features.summary))
        if self.pools_apart:
            return side.trunk_pool(side.norm_pool(features.stages[-1]).flatten(1, -2).mean(dim=1))
        return side.trunk(self._tokens(side, features).mean(dim=1))

    @torch.no_grad()
    def picture(self, batch: Batch) -> dict[str, tuple[Tensor, ...]]:
        """Per view: "mask" (b, *size) bool, voxels hidden from the student; "attention" (b, *cells) of the teacher."""
        look = self._look(batch, drop_path=False)
        shown = {"mask": hidden_voxels(look.mask, self.backbone.strides[self.stage], tuple(look.volume.shape[2:]))}
        if look.taught.attention is not None:
            shown["attention"] = look.taught.attention.unflatten(1, look.mask.where.shape[1:])
        return {name: split_views(x, self.views) for name, x in shown.items()}

    @torch.no_grad()
    def tokens(self, batch: Batch, t: float = 0.0) -> dict[str, Tensor]:
        """For collapse gauges: "student" and "teacher" (tokens, dim), stage tokens at hidden cells; "prototypes"
        (rows, K), the teacher's distributions at time t, of patches, with "crops", where they are distilled, else of
        images."""
        look, teacher = self._look(batch, drop_path=False), self.teacher
        assert teacher is not None
        found = {"student": hidden_rows(look.seen.stages[self.stage].flatten(1, -2), look.mask)[0]}
        found["teacher"], crops = hidden_rows(look.taught.stages[self.stage].flatten(1, -2), look.mask)
        if "patch" in self.weights:
            name, rows, found["crops"] = "patch", teacher.trunk(teacher.norm(found["teacher"])), crops
        else:
            name, rows = self.image[0], self._vectors(teacher, self.image[0], look.taught)
        sides = self._sides(name, teacher, torch.tensor(t))
        found["prototypes"] = sides.sharpen(sides.teacher(rows))
        return found


ibot_smart = setting(IBOT, image=("cls", "pool"), teacher_drop=0.7)
ibot_smart.__doc__ = "iBOT with SMART's semantic attention, attention-guided masks and noisy teacher (SMART, table VI)."
attmask = setting(IBOT, image=("cls",))
attmask.__doc__ = "AttMask: iBOT on [CLS] under masks that the clean teacher's attention guides (arXiv 2203.12719)."
