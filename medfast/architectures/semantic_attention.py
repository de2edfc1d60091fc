"""Semantic attention: a [CLS] token that reads a stage of the Swin and says what it looked at.

Source: SMART eq. 1; its author's code takes CaiT's class attention (Touvron et al., "Going deeper with image
transformers", ICCV 2021, eq. 5-7), in which the patch tokens are read and leave unchanged.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import medfast_kernels as mk

from .blocks import MLP


class ClassAttentionBlock(nn.Module):
    """cls + g1 * proj(attention(LN [cls; z])), then cls + g2 * MLP(LN cls); g1, g2 (width,) start at 1e-4."""

    def __init__(self, width: int, heads: int, mlp_ratio: float):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)
        self.gamma1 = nn.Parameter(torch.full((width,), 1e-4))
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width, int(mlp_ratio * width))
        self.gamma2 = nn.Parameter(torch.full((width,), 1e-4))

    def forward(self, cls: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """cls (b, width), tokens (b, n, width) -> cls (b, width), attention (b, n), its mean over heads."""
        u = self.norm1(torch.cat((cls.unsqueeze(1), tokens), dim=1))
        q = self.q(u[:, 0]).unflatten(-1, (self.heads, -1))
        k = self.k(u).unflatten(-1, (self.heads, -1))
        v = self.v(u).unflatten(-1, (self.heads, -1))
        out, attention = mk.class_attention(q, k, v)
        cls = cls + self.gamma1 * self.proj(out)
        return cls + self.gamma2 * self.mlp(self.norm2(cls)), attention


class SemanticAttention(nn.Module):
    """Two class attention blocks over the tokens of a stage. The [CLS] token starts at zero; no position embedding.

    width: channels of the stage, a multiple of ``heads`` (ValueError).
    """

    def __init__(self, width: int, heads: int = 12, mlp_ratio: float = 4.0, depth: int = 2):
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"sa_heads must divide the {width} channels of the stage it reads, got {heads}")
        self.cls = nn.Parameter(torch.zeros(width))
        self.blocks = nn.ModuleList(ClassAttentionBlock(width, heads, mlp_ratio) for _ in range(depth))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (b, *grid, width) -> [CLS] (b, width), [CLS]-to-token attention of the last block (b, n), raster order."""
        tokens = x.flatten(1, -2)
        cls = self.cls.expand(len(x), -1)
        for block in self.blocks:
            cls, attention = block(cls, tokens)
        return cls, attention
