"""SDDA-MAE against an evaluation written from its description, with a small network and with the real one."""

import math

import pytest
import torch
from torch import nn

from medfast.architectures import NETWORKS
from medfast.objectives.masking import AttentionMask, RandomMask
from medfast.objectives.sdda_mae import SDDAMAE
from medfast.types import Batch, Features, Key

T = torch.tensor(0.5)


class Encoder(nn.Module):
    """Patches of 4 pixels; stages of stride 4 and 8."""

    channels, strides, in_channels, embed, semantic_attention = (6, 8), (4, 8), 1, 6, None

    def __init__(self):
        super().__init__()
        self.patch, self.second = nn.Conv2d(1, 6, 4, 4), nn.Conv2d(6, 8, 2, 2)

    def forward(self, image, mask=None, fill=None, key=None):
        x = self.patch(image).movedim(1, -1)
        where = mask.where.repeat_interleave(4, 1).repeat_interleave(4, 2)
        one = torch.tanh(torch.where(where.unsqueeze(-1), fill, x))
        two = torch.tanh(self.second(one.movedim(-1, 1)).movedim(1, -1))
        return Features((one, two), two.mean((1, 2)))


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.up = Encoder(), nn.Linear(8, 6)

    def features(self, image, mask=None, fill=None, key=None):
        seen = self.encoder(image, mask, fill, key)
        up = self.up(seen.stages[-1]).repeat_interleave(2, 1).repeat_interleave(2, 2)
        return Features(seen.stages, seen.summary, extra={"decoder": torch.tanh(up)})


def made(network=None, **settings):
    torch.manual_seed(0)
    return SDDAMAE(network or Network(), RandomMask(0.6), classes=5, **settings).double()


def batch(shape=(3, 1, 1, 64, 64), **extra):
    torch.manual_seed(1)
    return Batch((torch.rand(shape, dtype=torch.float64),), None, Key(3, 2, torch.arange(shape[0])), **extra)


def test_losses_and_gradients_are_those_of_the_description():
    o, given = made(temperature=0.7), batch()
    image = given.views[0][:, :, 0]
    mask = o.mask((4, 4), given.key.at(0))
    seen = o.backbone.features(image, mask, o.fill)
    decoded, p = seen.extra["decoder"], dict(o.named_parameters())
    recon = distil = 0.0
    for i in range(3):
        wrong, count = 0.0, 0
        for cell in mask.hidden[i].tolist():
            for dy, dx in [(y, x) for y in range(4) for x in range(4)]:  # 4 x 4 tokens of a cell
                y, x = 4 * (cell // 4) + dy, 4 * (cell % 4) + dx
                drawn = p["pixels.linear.weight"] @ decoded[i, y, x] + p["pixels.linear.bias"]
                wrong = wrong + ((drawn.view(4, 4) - image[i, 0, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4]) ** 2).sum()
                count += 16
        recon = recon + wrong / count / 3
        student = (p["student.weight"] @ seen.stages[-1][i].mean((0, 1)) + p["student.bias"]) / 0.7
        with torch.no_grad():
            target = (p["target.weight"] @ decoded[i].mean((0, 1)) + p["target.bias"]) / 0.7
            target = target.exp() / target.exp().sum()
        distil = distil - (target * (student.exp() / student.exp().sum()).log()).sum() / 3
    found = o(given, T).losses
    trained = {name: x for name, x in p.items() if x.requires_grad}
    for name, expected in (("recon", recon), ("distil", distil)):
        torch.testing.assert_close(found[name], expected, rtol=1e-10, atol=0.0)
        ours, theirs = (
            torch.autograd.grad(loss, list(trained.values()), allow_unused=True, retain_graph=True)
            for loss in (found[name], expected)
        )
        for key, mine, other in zip(trained, ours, theirs, strict=True):
            assert (mine is None) == (other is None), (name, key)
            if mine is not None:
                torch.testing.assert_close(mine, other, rtol=1e-7, atol=1e-12)


def test_the_teacher_side_gets_no_gradient():
    o = made(weights={"recon": 0.0})
    o(batch(), T).losses["distil"].backward()
    assert o.backbone.up.weight.grad is None and o.target.weight.grad is None
    assert o.backbone.encoder.patch.weight.grad.abs().sum() > 0


def test_615_of_1024_cells_of_16_pixels_are_hidden():
    o, where = made(), RandomMask(0.6)((32, 32), Key(0, 0, torch.arange(3)))
    assert o.cells((1, 512, 512)) == o.cells((512, 512)) == (32, 32)
    assert where.where.flatten(1).sum(1).tolist() == [615] * 3 and where.visible.shape[1] == 409


def test_slices_are_images_and_keep_their_axes_in_pictures():
    o = made()
    sliced, image = batch(), batch()
    image = Batch((image.views[0].squeeze(2),), None, image.key)
    assert o(sliced, T).losses["recon"] == o(image, T).losses["recon"]
    assert o.picture(sliced)["reconstruction"][0].shape == (3, 1, 1, 64, 64)
    assert o.picture(sliced)["mask"][0].shape == (3, 1, 64, 64)
    with pytest.raises(ValueError, match="data.size"):
        o(batch((3, 1, 2, 64, 64)), T)


def test_padding_is_not_predicted():
    valid = torch.ones(3, 1, 64, 64, dtype=torch.bool)
    valid[:, :, 32:] = False
    o, given = made(), batch(valid=(valid,))
    error = (o.picture(given)["reconstruction"][0] - given.views[0])[:, 0].square()
    where = o.picture(given)["mask"][0] & valid
    expected = torch.stack([e[w].mean() for e, w in zip(error, where, strict=True)]).mean()
    torch.testing.assert_close(o(given, T).losses["recon"], expected, rtol=1e-5, atol=0, check_dtype=False)


def test_the_real_network_trains_every_parameter():
    network = NETWORKS["dae_former"](in_channels=1, classes=None, widths=[16, 24], depths=[1, 1], skips=False)
    o = made(network)
    losses = o(batch(), T).losses
    sum(losses.values()).backward()
    assert math.isfinite(losses["recon"].item()) and list(losses) == ["recon", "distil"]
    assert [name for name, p in o.named_parameters() if p.requires_grad and p.grad is None] == []


def test_what_cannot_work_is_refused(tiny):
    for network, mask in ((tiny.Backbone(None), RandomMask(0.6)), (Network(), AttentionMask(0.7))):
        with pytest.raises(ValueError, match="dae_former"):
            SDDAMAE(network, mask)
