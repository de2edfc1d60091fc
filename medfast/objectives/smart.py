"""SMART and DAGMaN: attention-guided masked image modelling, taught by a noisy teacher.

Sources: SMART, arXiv 2310.01209v2; DAGMaN, arXiv 2604.14506. docs/papers/smart.md maps every equation to its function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

import medfast_kernels as mk
from medfast.objectives.distillation import Sides, Term, distil_image, distil_patches, weighted
from medfast.objectives.heads import Prototypes, Trunk, Voxels
from medfast.objectives.losses import Centres, hidden_l1
from medfast.objectives.masking import count_of, drawn_ahead, hidden_rows, hidden_tokens, hidden_voxels, random_cells
from medfast.objectives.options import chosen_weights, momenta, one_of, positive, token_width
from medfast.objectives.schedules import Points, cosine, piecewise, points
from medfast.objectives.views import given_mask, grid_of, split_views, stack_valid, stack_views
from medfast.types import Backbone, Batch, Features, Key, Mask, Masker, Objective, Output, Teacher

WEIGHTS = {"amip": 1.0, "ampd": 0.1, "aitd": 0.1, "gitd": 0.1}


class Look(NamedTuple):
    """One look of teacher and student at a batch; views stacked along the batch axis."""

    volume: Tensor
    drop: Mask | None
    taught: Features | None
    mask: Mask
    seen: Features


class SMART(Objective):
    """AMIP + AMPD + AITD + GITD under attention-guided masks (SMART III, DAGMaN 3).

    backbone: with [CLS] attention, or without where ``aitd`` weighs 0 and ``mask`` is not guided by attention.
    mask: which cells the student does not see; a cell is one token of the distilled stage.
    teacher_drop: share r_t of cells hidden from the teacher, at random; 0 makes the teacher noiseless.
    gitd: "stage4", mean of the last stage's tokens through a trunk of its own (paper), or "stage3", mean of the
    distilled stage through the shared trunk (author's code).
    heads: last layers. "author": the student has one for images and one for patches, the teacher uses the image one
    for both; "mirrored": the teacher has both as well; "shared": one for everything.
    fill: "token", a learned mask token, or "zero".
    weights: of the losses amip, ampd, aitd, gitd; those left out keep their default, 0 removes a loss and its head.
    stage: whose tokens AMPD distils, from 1; None: where the backbone's [CLS] attends, 3 where it has none.
    image_temperature, patch_temperature: the teacher's, a number or [t, value] points.
    """

    views = 2
    fill: Tensor

    def __init__(
        self,
        backbone: Backbone,
        mask: Masker,
        teacher_drop: float = 0.7,
        gitd: str = "stage4",
        heads: str = "author",
        fill: str = "token",
        weights: Mapping[str, float] | None = None,
        stage: int | None = None,
        prototypes: int = 8192,
        head_widths: tuple[int, ...] = (2048, 2048, 256),
        student_temperature: float = 0.1,
        image_temperature: float | Points = 0.04,
        patch_temperature: float | Points = ((0.0, 0.04), (0.0375, 0.04), (0.0375, 0.07)),
        momentum: tuple[float, float] = (0.996, 1.0),
        centre_momentum: float = 0.9,
    ):
        super().__init__()
        self.weights = chosen_weights(weights, WEIGHTS)
        one_of("gitd", gitd, ("stage4", "stage3"))
        one_of("heads", heads, ("author", "mirrored", "shared"))
        one_of("fill", fill, ("token", "zero"))
        attended = backbone.semantic_attention
        guided = getattr(mask, "guided", False)
        if attended is None and (guided or "aitd" in self.weights):
            asks = "the mask is guided by it" if guided else "the loss aitd distils it"
            raise ValueError(
                f"this backbone has no [CLS] token and {asks}: give the backbone semantic_attention=3, or use the mask "
                "'random' with weights {aitd: 0}"
            )
        if not 0.0 <= teacher_drop < 1.0:
            raise ValueError(f"teacher_drop is a share of cells, in [0, 1), got {teacher_drop}")
        self.stage = (attended or 3 if stage is None else stage) - 1
        if not 0 <= self.stage < len(backbone.strides) or attended not in (None, self.stage + 1):
            raise ValueError(
                f"stage must be one of 1..{len(backbone.strides)} and the one whose tokens [CLS] attends to "
                f"({attended}), got {stage}"
            )
        self.backbone, self.mask = backbone, mask
        self.teacher_drop, self.pools_last = teacher_drop, gitd == "stage4"
        self.student_temperature = positive("student_temperature", student_temperature)
        self.temperatures = {"image": points(image_temperature), "patch": points(patch_temperature)}
        self.momenta = momenta(momentum)
        if fill == "token":
            self.fill = nn.Parameter(torch.zeros(token_width(backbone)))
        else:
            self.register_buffer("fill", torch.zeros(token_width(backbone)))
        self._build_heads(heads, prototypes, tuple(head_widths), centre_momentum)
        self.teacher = Teacher(self, *self._teacher_parts()) if guided or self.centres.names else None

    def _build_heads(self, heads: str, prototypes: int, widths: tuple[int, ...], centre_momentum: float) -> None:
        """Only what some loss trains: norms of stages, trunks, last layers, centres, voxels."""
        on, backbone = self.weights, self.backbone
        width, widest = backbone.channels[self.stage], backbone.channels[-1]
        semantic = "ampd" in on or "aitd" in on or ("gitd" in on and not self.pools_last)
        if semantic:
            self.norm_semantic = nn.LayerNorm(width)
        if "amip" in on or ("gitd" in on and self.pools_last):
            self.norm_final = nn.LayerNorm(widest)
        if "amip" in on:
            self.voxels = Voxels(widest, backbone.strides[-1], backbone.in_channels)
        if semantic:
            self.trunk = Trunk(width, widths)
        if "gitd" in on and self.pools_last:
            self.trunk_final = Trunk(widest, widths)
        images = "aitd" in on or "gitd" in on
        self.patch_layer = "image_last" if images and heads == "shared" else "patch_last"
        # with no image loss there is no image layer that the author's teacher could borrow for its patches
        self.teacher_patch_layer = "image_last" if images and heads != "mirrored" else "patch_last"
        if images:
            self.image_last = Prototypes(widths[-1], prototypes)
        if "ampd" in on and self.patch_layer == "patch_last":
            self.patch_last = Prototypes(widths[-1], prototypes)
        self.centres = Centres((name for name in on if name != "amip"), prototypes, centre_momentum)

    def _teacher_parts(self) -> list[str]:
        """Names of what the teacher's forward reads; a layer that it never uses is not copied."""
        used = ["backbone"]
        if self.teacher_drop:
            used.append("fill")
        if "ampd" in self.weights:
            used.append(self.teacher_patch_layer)
        if self.centres.names:
            used += ["norm_semantic", "trunk", "trunk_final", "image_last"]
        if "gitd" in self.weights and self.pools_last:
            used.append("norm_final")
        return [name for name in dict.fromkeys(used) if hasattr(self, name)]

    def momentum(self, t: float) -> float:
        """Cosine .996 to 1 over the run, a function of the global step (SMART III.D)."""
        return cosine(*self.momenta, t)

    def absorb(self, sums: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        self.centres.absorb(sums)

    def forward(self, batch: Batch, t: Tensor) -> Output:
        look = self._look(batch, drop_path=self.training)
        losses, terms = {}, self._distil(look, t)
        if "amip" in self.weights:
            stride = self.backbone.strides[self.stage]
            losses["amip"] = hidden_l1(self._reconstruct(look), look.volume, look.mask, stride, stack_valid(batch))
        losses |= {name: term.loss for name, term in terms.items()}
        return weighted(self.weights, losses, terms, look.mask)

    def cells(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """A cell of the mask is one token of the distilled stage."""
        return grid_of(size, self.backbone.strides[self.stage])

    def ahead(self, size: tuple[int, ...]) -> dict[str, Callable[[Key], Tensor]]:
        return drawn_ahead(self.mask, self.cells(size))

    def _look(self, batch: Batch, drop_path: bool) -> Look:
        """Steps 2 to 4 of an iteration: the noisy teacher looks, its attention makes the masks, the student looks."""
        volume, key = stack_views(batch, self.views)
        cells = self.cells(tuple(volume.shape[2:]))
        drop = taught = None
        if self.teacher is not None:
            with torch.no_grad():
                if self.teacher_drop:
                    count = count_of(self.teacher_drop, math.prod(cells))
                    drop = random_cells(cells, count, key.at(mk.Role.TEACHER_DROP))
                taught = self.teacher.backbone(volume, drop, self.teacher.fill if self.teacher_drop else None)
        mask = given_mask(batch, cells) or self.mask(cells, key, None if taught is None else taught.attention)
        seen = self.backbone(volume, mask, self.fill, key if drop_path else None)
        return Look(volume, drop, taught, mask, seen)

    def _voxels_of(self, look: Look, mask: Mask) -> Tensor:
        return hidden_voxels(mask, self.backbone.strides[self.stage], look.volume.shape[2:])

    def _reconstruct(self, look: Look) -> Tensor:
        """h^Pred of the student's last stage (eq. 6): (2 b, c, *size)."""
        return self.voxels(self.norm_final(look.seen.stages[-1]), look.volume.shape[2:])

    def _distil(self, look: Look, t: Tensor) -> dict[str, Term]:
        """AMPD, AITD, GITD: those that weigh anything."""
        teacher, terms = self.teacher, {}
        if teacher is None or look.taught is None:
            return terms
        if "ampd" in self.weights:
            hidden = hidden_tokens(self._patches(self, look.seen), look.mask)[0]
            taught = teacher.trunk(self._patches(teacher, look.taught))
            terms["ampd"] = distil_patches(self.trunk(hidden), taught, look.mask, self._sides("ampd", teacher, t))
        seen, taught = self._image_vectors(self, look.seen), self._image_vectors(teacher, look.taught)
        for name, vectors in seen.items():
            terms[name] = distil_image(vectors, taught[name], self._sides(name, teacher, t))
        return terms

    def _sides(self, name: str, teacher: Teacher, t: Tensor) -> Sides:
        patch = name == "ampd"
        temperature = piecewise(self.temperatures["patch" if patch else "image"], t)
        return Sides(
            getattr(self, self.patch_layer if patch else "image_last"),
            getattr(teacher, self.teacher_patch_layer if patch else "image_last"),
            self.student_temperature,
            partial(self.centres, name, temperature=temperature),
        )

    def _patches(self, side: SMART | Teacher, features: Features) -> Tensor:
        """Normalised tokens of the distilled stage, (2 b, n, c)."""
        return side.norm_semantic(features.stages[self.stage]).flatten(1, -2)

    def _image_vectors(self, side: SMART | Teacher, features: Features) -> dict[str, Tensor]:
        """Normalised vector of each view, (2 b, width), for AITD ([CLS]) and GITD (mean of a stage's tokens)."""
        vectors = {}
        if "aitd" in self.weights:
            # [CLS] starts at zero behind LayerScale 1e-4: un-normalised, the trunk's L2 norm has gradients of 1e7
            vectors["aitd"] = side.trunk(side.norm_semantic(features.summary))
        if "gitd" in self.weights and self.pools_last:
            pooled = side.norm_final(features.stages[-1]).flatten(1, -2).mean(dim=1)
            vectors["gitd"] = side.trunk_final(pooled)
        elif "gitd" in self.weights:
            vectors["gitd"] = side.trunk(self._patches(side, features).mean(dim=1))
        return vectors

    @torch.no_grad()
    def picture(self, batch: Batch) -> dict[str, tuple[Tensor, ...]]:
        """What a reader wants to see, one tensor per view, with the masks that ``forward`` has on this batch.

        "mask": (b, *size) bool, voxels hidden from the student. "reconstruction": (b, c, *size) fp32. "drop":
        (b, *size) bool, voxels hidden from the teacher. "attention": (b, *cells) of the teacher. Those that these
        settings do not have are missing.
        """
        look = self._look(batch, drop_path=False)
        shown = {"mask": self._voxels_of(look, look.mask)}
        if "amip" in self.weights:
            shown["reconstruction"] = self._reconstruct(look).float()
        if look.drop is not None:
            shown["drop"] = self._voxels_of(look, look.drop)
        if look.taught is not None and look.taught.attention is not None:
            shown["attention"] = look.taught.attention.unflatten(1, look.mask.where.shape[1:])
        return {name: split_views(x, self.views) for name, x in shown.items()}

    @torch.no_grad()
    def tokens(self, batch: Batch, t: float = 0.0) -> dict[str, Tensor]:
        """For collapse gauges: "student" and "teacher" (tokens, dim), stage tokens at hidden cells; "prototypes"
        (rows, K), the teacher's distributions at time t, of AMPD, with "crops", if it is on, else of an image loss."""
        look, teacher = self._look(batch, drop_path=False), self.teacher
        found = {"student": self._gauged(self, look.seen, look.mask)[0]}
        if teacher is None or look.taught is None:
            return found
        found["teacher"], crops = self._gauged(teacher, look.taught, look.mask)
        if self.centres.names:
            name = self.centres.names[0]
            patch = name == "ampd"
            rows = teacher.trunk(found["teacher"]) if patch else self._image_vectors(teacher, look.taught)[name]
            sides = self._sides(name, teacher, torch.tensor(t))
            found |= {"prototypes": sides.sharpen(sides.teacher(rows)), **({"crops": crops} if patch else {})}
        return found

    def _gauged(self, side: SMART | Teacher, features: Features, mask: Mask) -> tuple[Tensor, Tensor]:
        tokens = features.stages[self.stage].flatten(1, -2)
        return hidden_rows(side.norm_semantic(tokens) if "ampd" in self.weights else tokens, mask)
