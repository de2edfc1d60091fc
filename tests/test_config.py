"""Experiments: every preset validates and builds tiny; wrong keys are refused with the nearest right one."""

from pathlib import Path

import pytest
import torch

from medfast import config
from medfast.__main__ import main

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
SMART = next(path for path in CONFIGS if path.stem == "smart")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_presets_validate_and_build_tiny(path):
    loaded = config.load(path, tiny=True)
    objective = config.build(loaded)
    assert objective.views == 2
    assert sum(p.numel() for p in objective.parameters()) < 30_000_000


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_preset_headers_name_command_hardware_and_sources(path):
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    text = " ".join(header).lower()
    for word in ("medfast pretrain", "hardware", "source"):
        assert word in text, f"{path.name}: the header lacks {word!r}"


@pytest.mark.parametrize(
    ("override", "offered"),
    [
        ("optim.lrr=1e-3", "lr"),
        ("train.step=3", "steps"),
        ("data.sizes=64", "size"),
        ("objective.backbone.embedd=12", "embed"),
        ("objective.mask.ratios=0.5", "ratio"),
        ("trian.steps=3", "train"),
    ],
)
def test_unknown_keys_offer_the_nearest(override, offered, capsys):
    assert main(["pretrain", str(SMART), override, "out=/nonexistent", "data.store=/nonexistent"]) == 2
    message = capsys.readouterr().err
    assert "unknown key" in message and f"did you mean {offered!r}" in message


def test_unknown_names_are_refused():
    with pytest.raises(config.ConfigError, match="no architecture called 'swim' .did you mean 'swin'"):
        config.load(SMART, "objective.backbone.name=swim")
    with pytest.raises(config.ConfigError, match="section.key=value"):
        config.load(SMART, "optim.lr")
    with pytest.raises(config.ConfigError, match="there is no file"):
        config.load("nothing.yaml")


def test_overrides_reach_their_value():
    loaded = config.load(SMART, "optim.lr=3e-4", "train.batch=6", "data.window=[-100, 300]", "init=null", steps=7)
    assert loaded["optim"]["lr"] == 3e-4
    assert loaded["train"]["batch"] == 6 and loaded["train"]["steps"] == 7
    assert loaded["data"]["window"] == [-100, 300]


def test_build_draws_parameters_from_the_seed_alone():
    def fingerprint(seed, before):
        torch.manual_seed(before)
        objective = config.build(config.load(SMART, f"train.seed={seed}", tiny=True))
        return torch.cat([p.detach().flatten()[:8] for p in objective.parameters()])

    assert torch.equal(fingerprint(1, 10), fingerprint(1, 20))
    assert not torch.equal(fingerprint(1, 10), fingerprint(2, 10))


def test_missing_store_and_out_say_what_to_add(capsys):
    assert main(["pretrain", str(SMART), "out=/tmp/x"]) == 2
    assert "data.store=STORE" in capsys.readouterr().err
