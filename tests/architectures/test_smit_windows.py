"""SMIT's order of windows: against the published partition and reverse, written out, padded and shifted."""

import pytest
import torch
from torch.nn import functional as F

from medfast.architectures import NETWORKS, Swin
from medfast.architectures.smit_windows import ScramblingWindowAttention
from medfast_kernels.modules import WindowAttention

ORDER = (0, 1, 3, 5, 2, 4, 6, 7)  # of axes, both to take windows out and, in the published code, to put them back


def published(x, attend, window, shift):
    """x (1, d, h, w, c): pad, roll, take windows out, attend, put them back, roll back, crop, as models/Trans.py does.

    attend: what a whole map of attention gives, tokens where they were; it is cut into windows here."""
    d, h, w = x.shape[1:4]
    x = F.pad(x, (0, 0, *(p for n in (w, h, d) for p in (0, -n % window))))
    y = torch.roll(attend(x), (-shift,) * 3, (1, 2, 3))
    counts = [n // window for n in y.shape[1:4]]
    split = [size for n in counts for size in (n, window)]
    windows = y.view(1, *split, -1).permute(ORDER).reshape(-1, window, window, window, y.shape[-1])
    back = windows.view(1, *counts, window, window, window, -1).permute(ORDER).reshape(y.shape)
    return torch.roll(back, (shift,) * 3, (1, 2, 3))[:, :d, :h, :w]


@pytest.mark.parametrize("shift, grid", [(0, (4, 4, 4)), (1, (4, 6, 2)), (2, (5, 4, 7))])
def test_tokens_lie_where_the_published_code_puts_them(shift, grid):
    torch.manual_seed(0)
    window = 2 if shift < 2 else 4
    ours = ScramblingWindowAttention(6, 2, window, shift, clip=False).double()
    plain = WindowAttention(6, 2, window, shift, clip=False).double()
    plain.load_state_dict(ours.state_dict())
    x = torch.randn(1, *grid, 6, dtype=torch.float64)
    torch.testing.assert_close(ours(x), published(x, plain, window, shift))
    assert ours(x).shape == x.shape
    if grid != (window,) * 3:  # one window alone stays where it is but for the turned axes
        assert not torch.allclose(ours(x), plain(x))


def test_it_is_a_switch_of_the_swin_and_of_the_network():
    tiny = {"embed": 8, "depths": (2, 1), "heads": (2, 4), "window": 2}
    torch.manual_seed(0)
    plain, code = Swin(**tiny), Swin(**tiny, window_order="smit_code")
    code.load_state_dict(plain.state_dict())
    volume = torch.randn(1, 1, 14, 16, 12)
    assert not torch.allclose(plain(volume).summary, code(volume).summary)
    net = NETWORKS["smit_unet"](**tiny, window_order="smit_code")
    assert isinstance(net.encoder.stages[0].blocks[1].attn, ScramblingWindowAttention)
    with pytest.raises(ValueError, match="never clips them: give clip=False"):
        Swin(**tiny, window_order="smit_code", clip=True)
    with pytest.raises(ValueError, match="window_order must be one of 'inverse', 'smit_code', got 'smit'"):
        Swin(**tiny, window_order="smit")
