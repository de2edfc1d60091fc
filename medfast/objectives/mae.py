"""MAE: a ViT that computes the visible patches only, and a light decoder that fills in the hidden ones.

Source: He et al., CVPR 2022, arXiv 2111.06377, and its public code. docs/papers/mae.md maps it to functions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import medfast_kernels as mk
from medfast.architectures.blocks import init_weights
from medfast.architectures.vit import Attention, ViTBlock, sincos
from medfast.objectives.losses import patch_mse
from medfast.objectives.masking import hidden_tokens, hidden_voxels, with_ids
from medfast.objectives.patches import from_patches, to_patches, voxels_of_patch
from medfast.objectives.views import given_mask, grid_of, split_views, stack_valid, stack_views
from medfast.types import Batch, DropsTokens, Mask, Masker, Objective, Output


class Decoder(nn.Module):
    """Blocks over all tokens, hidden ones as one learned vector: (b, [1 +] visible, in_width) -> (b, n, width).

    grid: tokens per axis that the fixed positions are made for; for other grids they are made anew.
    """

    position: Tensor

    def __init__(self, in_width: int, width: int, depth: int, heads: int, grid: tuple[int, ...]):
        super().__init__()
        if depth < 1 or heads < 1 or width % heads or width < 6:
            raise ValueError(f"decoder: heads divide width, depth is at least 1, got {width=}, {depth=}, {heads=}")
        self.width, self.grid = width, tuple(grid)
        self.embed = nn.Linear(in_width, width)
        self.fill = nn.Parameter(nn.init.normal_(torch.empty(width), std=0.02))
        self.blocks = nn.ModuleList(
            ViTBlock(Attention(width, heads, qkv_bias=True, cls_out=False), width, 4 * width, 0.0, 2 * i, False)
            for i in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.apply(init_weights)
        self.register_buffer("position", self._positions(self.grid))

    def forward(self, seen: Tensor, mask: Mask, grid: tuple[int, ...]) -> Tensor:
        visible = mask.visible
        assert visible is not None
        first, n = seen.shape[1] - visible.shape[1], mask.where[0].numel()
        x = self.embed(seen)
        position = self.position if tuple(grid) == self.grid else self._positions(grid).to(x.device)
        tokens = mk.restore_tokens(x[:, first:], visible, n, self.fill) + position
        x = torch.cat((x[:, :first].to(tokens.dtype), tokens), dim=1)
        for block in self.blocks:
            x = block(x, None)[0]
        return self.norm(x[:, first:])

    def _positions(self, grid: tuple[int, ...]) -> Tensor:
        """(n, width): sines and cosines of three axes need a multiple of 6, the channels beyond it hold zeros."""
        waves = sincos(grid, self.width - self.width % 6).flatten(0, 2)
        return F.pad(waves, (0, self.width % 6))


class Look(NamedTuple):
    """volume (b, c, *size), its mask, what the encoder made of the visible tokens, and the decoded tokens (b, n, w)."""

    volume: Tensor
    mask: Mask
    seen: Tensor
    decoded: Tensor


class MAE(Objective):
    """recon: mean squared error on the voxels of the hidden patches.

    backbone: one that leaves hidden tokens out (ViT). mask: hides equally many cells in all samples, e.g.
    RandomMask(0.75, "floor"); a cell is a token. decoder_width, decoder_depth, decoder_heads: of the decoder's blocks.
    normalise: targets are each patch less its mean, over its deviation (the paper's "norm pix").
    """

    views = 1

    def __init__(
        self,
        backbone: DropsTokens,
        mask: Masker,
        decoder_width: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        normalise: bool = False,
    ):
        super().__init__()
        if not isinstance(backbone, DropsTokens):
            raise ValueError(
                f"MAE needs a backbone that can leave hidden tokens out (encode_visible), {type(backbone).__name__} "
                "cannot: use the backbone 'vit', or the objective 'simmim', which replaces hidden tokens"
            )
        if getattr(mask, "guided", False) or not getattr(mask, "even", True):
            raise ValueError(
                "MAE drops tokens, so all samples must hide equally many, and there is no teacher whose attention "
                "could guide: use the mask 'random'"
            )
        self.backbone, self.mask, self.normalise = backbone, mask, normalise
        self.stride = backbone.strides[-1]
        grid = getattr(backbone, "grid", (8, 8, 8))
        self.decoder = Decoder(backbone.channels[-1], decoder_width, decoder_depth, decoder_heads, grid)
        self.predict = nn.Linear(decoder_width, backbone.in_channels * voxels_of_patch(self.stride))
        init_weights(self.predict)

    def forward(self, batch: Batch, t: Tensor) -> Output:
        look = self._look(batch, drop_path=self.training)
        valid = stack_valid(batch)
        real = torch.ones_like(look.volume) if valid is None else valid.unsqueeze(1).expand_as(look.volume)
        patches = (to_patches(x, self.stride) for x in (look.volume, real.to(look.volume)))
        target, weight = (hidden_tokens(x, look.mask)[0] for x in patches)
        prediction = self.predict(hidden_tokens(look.decoded, look.mask)[0])
        loss = patch_mse(prediction, self._normalised(target), weight)
        gauges = {"mask_ratio": look.mask.where.to(torch.float32).mean()}
        return Output({"recon": loss}, gauges)

    def cells(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """A cell of the mask is one token."""
        return grid_of(size, self.stride)

    def _look(self, batch: Batch, drop_path: bool) -> Look:
        volume, key = stack_views(batch, self.views)
        cells = self.cells(tuple(volume.shape[2:]))
        given = given_mask(batch, cells)
        mask = self.mask(cells, key) if given is None else with_ids(given)
        seen = self.backbone.encode_visible(volume, mask, key if drop_path else None)
        return Look(volume, mask, seen, self.decoder(seen, mask, cells))

    def _normalised(self, patches: Tensor) -> Tensor:
        if not self.normalise:
            return patches
        variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
        return (patches - mean) / (variance + 1e-6).sqrt()

    @torch.no_grad()
    def picture(self, batch: Batch) -> dict[str, tuple[Tensor, ...]]:
        """Per view: "mask" (b, *size) bool, voxels hidden; "reconstruction" (b, c, *size) fp32, not where targets are
        normalised."""
        look = self._look(batch, drop_path=False)
        size = tuple(look.volume.shape[2:])
        shown = {"mask": hidden_voxels(look.mask, self.stride, size)}
        if not self.normalise:
            patches = self.predict(look.decoded).unflatten(1, self.cells(size))
            shown["reconstruction"] = from_patches(patches, self.stride, look.volume.shape[1], size).float()
        return {name: split_views(x, self.views) for name, x in shown.items()}

    @torch.no_grad()
    def tokens(self, batch: Batch, t: float = 0.0) -> dict[str, Tensor]:
        """For collapse gauges: "student" (tokens, dim), the encoder's visible ones."""
        look = self._look(batch, drop_path=False)
        assert look.mask.visible is not None
        return {"student": look.seen[:, -look.mask.visible.shape[1] :].flatten(0, 1)}
