"""Groups, schedules, clipping."""

import math

import pytest
import tiny_task as task
import torch

from medfast.training.optim import clip, groups, rates, set_rates
from medfast.training.settings import Optim, Train


def test_biases_and_vectors_do_not_decay_and_frozen_layers_stand_still(tmp_path):
    found = groups(dict(task.build().named_parameters()), Optim(frozen={"last*": 0.5}))
    decays = {name for group in found if group.decays for name in group.names}
    assert decays == {"backbone.0.weight", "backbone.2.weight", "recon.weight", "last.weight"}
    task.run(tmp_path, optim__frozen={"last*": 0.5}, train__checkpoint_every=1, train__keep_last=9)
    last = [task.tensors(tmp_path, step)["student/last.weight"] for step in (1, 4, 5)]
    assert torch.equal(last[0], last[1]) and not torch.equal(last[1], last[2])


def test_lr_scale_multiplies_the_rate_of_what_it_matches(tmp_path):
    optim = Optim(lr_scale={"*weight": 3.0, "last*": 0.5})
    rules = groups(dict(task.build().named_parameters()), optim)
    scales = {name: rule.lr_scale for rule in rules for name in rule.names}
    assert scales["recon.weight"] == 3.0 and scales["recon.bias"] == 1.0 and scales["last.weight"] == 0.5
    written: list[dict] = [{} for _ in rules]
    set_rates(written, rules, 0.1, 0.04, 0.5)
    assert [group["lr"] for group in written] == pytest.approx([0.1 * rule.lr_scale for rule in rules])

    def moved(name, lr_scale):
        task.run(tmp_path / name, optim__lr_scale=lr_scale, train__checkpoint_every=1, train__keep_last=9)
        first, second = (task.tensors(tmp_path / name, step)["student/last.weight"] for step in (1, 2))
        return (second - first).abs().mean().item()

    assert moved("slow", {"last*": 0.1}) == pytest.approx(0.1 * moved("plain", None), rel=0.1)


def test_rates():
    optim = Optim(lr=1.0, min_lr=0.1, warmup=0.2, weight_decay=(0.04, 0.4))
    assert [rates(optim, t)[0] for t in (0, 0.1, 0.2)] == pytest.approx([0, 0.5, 1])
    assert rates(optim, 0.6)[0] == pytest.approx(0.55) and rates(optim, 1.0) == pytest.approx((0.1, 0.4))
    assert rates(optim, 0.25)[1] == pytest.approx(0.4 - 0.36 * (1 + math.cos(math.pi / 4)) / 2)


def test_clip():
    start = [torch.tensor([3.0, 4.0]), torch.tensor([0.3])]
    each, whole = [x.clone() for x in start], [x.clone() for x in start]
    assert clip(each, {"kind": "per_parameter", "max": 1.0}).item() == pytest.approx(math.hypot(5, 0.3))
    assert each[0].norm() == pytest.approx(1.0, rel=1e-5) and torch.equal(each[1], start[1])
    clip(whole, {"kind": "global", "max": 1.0})
    assert torch.cat(whole).norm() == pytest.approx(1.0, rel=1e-5)


def test_global_batch_must_divide():
    assert Train(batch=8, micro=2).shares(2) == (4, 2)
    with pytest.raises(ValueError, match="train.batch=8 .* 3 ranks"):
        Train(batch=8).shares(3)
