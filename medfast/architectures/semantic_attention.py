"""Semantic attention: a [CLS] token that reads a stage of the Swin and says what it looked at.

Source: SMART eq. 1; its author's code takes CaiT's class attention (Touvron et al., "Going deeper with image
transformers", ICCV 2021, eq. 5-7), in which the patch tokens are read and leave unchanged.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import medfast_kernels as mk

from .blocks import MLP

SA_TYPES = {"class": False, "vit": True}  # whether patch tokens attend and are updated too


class SemanticBlock(nn.Module):
    """x + g1 * proj(attention(LN x)), then x + g2 * MLP(LN x), on the [CLS] row alone, or on all rows (``every_row``).

    Keys and values come from all rows either way, and the parameters are the same; g1, g2 (width,) start at 1e-4.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float, every_row: bool):
        super().__init__()
        self.heads, self.every_row = heads, every_row
        self.norm1 = nn.LayerNorm(width)
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)
        self.gamma1 = nn.Parameter(torch.full((width,), 1e-4))
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width, int(mlp_ratio * width))
        self.gamma2 = nn.Parameter(torch.full((width,), 1e-4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (b, 1 + n, width), [CLS] first -> the same, updated, and [CLS]'s attention (b, n), its mean over heads."""
        rows = x.shape[1] if self.every_row else 1
        u = self.norm1(x)
        q = self.q(u[:, :rows]).unflatten(-1, (self.heads, -1))
        k = self.k(u).unflatten(-1, (self.heads, -1))
        v = self.v(u).unflatten(-1, (self.heads, -1))
        out, attention = mk.class_attention(q[:, 0], k, v)
        out = out.unsqueeze(1)
        if self.every_row:
            patches = F.scaled_dot_product_attention(*(y.transpose(1, 2) for y in (q[:, 1:], k, v)))
            out = torch.cat((out, patches.transpose(1, 2).flatten(2)), dim=1)
        updated = x[:, :rows] + self.gamma1 * self.proj(out)
        updated = updated + self.gamma2 * self.mlp(self.norm2(updated))
        return torch.cat((updated, x[:, rows:]), dim=1), attention


class SemanticAttention(nn.Module):
    """Two blocks over the tokens of a stage. The [CLS] token starts at zero; no position embedding.

    width: channels of the stage, a multiple of ``heads`` (ValueError). kind: "class", only [CLS] attends, or "vit",
    patch tokens attend and are updated too. Either way the module stands beside the stage and gives [CLS] alone: what
    it makes of the patch tokens is read by [CLS] in the next block, so the last block need not update them.
    """

    def __init__(self, width: int, heads: int = 12, mlp_ratio: float = 4.0, depth: int = 2, kind: str = "class"):
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"sa_heads must divide the {width} channels of the stage it reads, got {heads}")
        self.cls = nn.Parameter(torch.zeros(width))
        every_row = [SA_TYPES[kind]] * (depth - 1) + [False]
        self.blocks = nn.ModuleList(SemanticBlock(width, heads, mlp_ratio, every) for every in every_row)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (b, *grid, width) -> [CLS] (b, width), [CLS]-to-token attention of the last block (b, n), raster order."""
        cls = self.cls.to(x.dtype).expand(len(x), 1, -1)
        x = torch.cat((cls, x.flatten(1, -2)), dim=1)
        for block in self.blocks:
            x, attention = block(x)
        return x[:, 0], attention
