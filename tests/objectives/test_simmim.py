"""SimMIM on a tiny backbone in fp64, against an evaluation written from its description."""

import pytest
import torch

from medfast.architectures import BACKBONES
from medfast.objectives.masking import AttentionMask, RandomMask
from medfast.objectives.simmim import SimMIM
from medfast.types import Batch, Mask

T = torch.tensor(0.5)


def simmim(tiny, **settings):
    torch.manual_seed(0)
    return SimMIM(tiny.Backbone(None, settings.pop("drop_path", 0.0)), RandomMask(0.6), stage=1, **settings).double()


def one_view(whole):
    return Batch(whole.views[:1], None, whole.key, targets=whole.targets)


def test_loss_and_gradients_are_those_of_the_description(tiny):
    o, batch = simmim(tiny), one_view(tiny.batch(2))
    volume, masks = batch.views[0], o.picture(batch)["mask"][0]
    assert masks.flatten(1).sum(1).tolist() == [39 * 512] * 2  # ceil(.6 x 64) cells of 8^3 voxels
    seen = o.backbone(volume, Mask(masks[:, ::8, ::8, ::8]), o.fill)
    expected = 0.0
    for i in range(2):
        tokens = seen.stages[1][i] @ o.voxels.linear.weight.T + o.voxels.linear.bias
        made = tokens.view(2, 2, 2, 16, 16, 16).permute(0, 3, 1, 4, 2, 5).reshape(32, 32, 32)
        error = (made - volume[i, 0]).abs()[masks[i]]
        expected = expected + error.sum() / (len(error) + 1e-5) / 2
    found = o(batch, T).losses
    assert list(found) == ["recon"]
    torch.testing.assert_close(found["recon"], expected, rtol=1e-11, atol=0.0)
    parameters = list(o.parameters())
    ours, theirs = (torch.autograd.grad(x, parameters) for x in (found["recon"], expected))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-8, atol=1e-12)
        assert mine.any()


def test_a_cell_of_a_swin_is_eight_patches_and_a_token_of_a_vit():
    swin = BACKBONES["swin"](embed=12, depths=[2, 2, 2, 2], heads=[1, 2, 4, 8], window=2, patch=2)
    vit = BACKBONES["vit"](size=32, patch=8, embed=12, depth=1, heads=2)
    assert SimMIM(swin, RandomMask(0.6)).cells((128, 128, 96)) == (8, 8, 6)
    assert SimMIM(vit, RandomMask(0.6)).cells((32, 32, 32)) == (4, 4, 4)


def test_the_mask_token_starts_as_the_papers(tiny):
    torch.manual_seed(0)
    fill = SimMIM(tiny.Backbone(None), RandomMask(0.6), stage=1).fill
    assert fill.any() and fill.abs().max() <= 2.0 and fill.std() < 0.05


def test_a_hidden_voxel_is_not_seen(tiny):
    o, batch = simmim(tiny), one_view(tiny.batch(2))
    hidden = o.picture(batch)["mask"][0].unsqueeze(1)
    changed = Batch((torch.where(hidden, 9.0, batch.views[0]),), None, batch.key)
    assert torch.equal(o.picture(batch)["reconstruction"][0], o.picture(changed)["reconstruction"][0])


def test_what_simmim_cannot_train_is_refused(tiny):
    for backbone, mask in ((tiny.Backbone(1), RandomMask()), (tiny.Backbone(None), AttentionMask())):
        with pytest.raises(ValueError, match="CLS"):
            SimMIM(backbone, mask)
    with pytest.raises(ValueError, match="stage"):
        SimMIM(tiny.Backbone(None), RandomMask(), stage=3)
