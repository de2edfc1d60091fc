"""The stage of MONAI's SwinTransformer: its blocks are Video-Swin's, and around them there is work to save.

Source: Project-MONAI/MONAI, monai/networks/nets/swin_unetr.py (1.6.1).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ._swap import Swapped, is_swapped, mixed


class Layer(Swapped):
    """A stage whose blocks are all swapped: no shift mask, which nobody reads, and one copy to channels-last.

    Theirs works on a permuted view all along, which every LayerNorm and Linear of the stage copies for itself.
    """

    blocks: nn.ModuleList
    downsample: nn.Module | None

    def forward(self, x: Tensor) -> Tensor:
        x = x.movedim(1, -1).contiguous()
        for block in self.blocks:
            x = block(x, None)
        if self.downsample is not None:
            x = self.downsample(x)
        return x.movedim(-1, 1)


def swap_layer(module: Any) -> None:
    """Swap a BasicLayer of MONAI all of whose blocks are swapped; other modules stay as they are."""
    cls = type(module)
    if (cls.__name__, cls.__module__) != ("BasicLayer", "monai.networks.nets.swin_unetr"):
        return
    known = {name for name, _ in module.named_children()} <= {"blocks", "downsample"}
    if known and all(map(is_swapped, module.blocks)):
        module.__class__ = mixed(Layer, cls)
