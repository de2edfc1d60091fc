"""Window attention as SMIT's public code has it, for weights that were trained with it.

Source: The-Veeraraghavan-Lab/SMIT, models/Trans.py, window_reverse. It puts windows back with the order of axes that
took them out, which is not its inverse, so that tokens change places in every block.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from medfast_kernels.modules import WindowAttention
from medfast_kernels.swin.smit import scrambled

from .blocks import per_axis


class ScramblingWindowAttention(WindowAttention):
    """``WindowAttention`` whose output tokens lie where SMIT's public code puts them, pad tokens among them.

    ValueError where it would clip windows, which that code never does.
    """

    def __init__(self, *sizes, clip: bool, **settings):
        if clip:
            raise ValueError(
                "window_order='smit_code' pads a map to whole windows and never clips them: give clip=False"
            )
        super().__init__(*sizes, clip=clip, **settings)

    def forward(self, x: Tensor, keep: Tensor | None = None, key=None) -> Tensor:
        window, shift = per_axis(self.window), (self.shift,) * 3 if isinstance(self.shift, int) else self.shift
        d, h, w = x.shape[1:-1]
        sizes = zip(reversed(x.shape[1:-1]), reversed(window), strict=True)
        x = F.pad(x, (0, 0, *(p for n, side in sizes for p in (0, -n % side))))
        return scrambled(super().forward(x, keep, key), window, shift)[:, :d, :h, :w]


WINDOW_ORDERS = {"inverse": WindowAttention, "smit_code": ScramblingWindowAttention}
