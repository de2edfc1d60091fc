"""Weights of runs and experiments: exported runs that start others, refusals, names that mean encoder and network."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from medfast import config
from medfast.__main__ import main
from medfast.architectures import interop
from medfast.cards import loader
from medfast.interchange import export_weights
from medfast.training import checkpoint, start

CONFIGS = Path(__file__).parents[1] / "configs"
DEMO = CONFIGS / "demo.yaml"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with a checkpoint, written without training."""
    folder = tmp_path_factory.mktemp("run")
    settings = config.load(DEMO, tiny=True)
    (folder / "config.resolved.yaml").write_text(yaml.safe_dump(settings))
    objective = config.build(settings)
    parts = {**checkpoint.describe(objective), "optimizer": {}}
    parts["teacher"] = {name: x + 1 for name, x in parts["teacher"].items()}
    checkpoint.save(folder, 7, parts, {}, keep=1)
    return folder, settings, objective


def test_a_run_is_exported_and_starts_another_one(run, tmp_path, capsys):
    folder, settings, objective = run
    out = tmp_path / "out"
    assert main(["export", str(folder), "--out", str(out), "--part", "teacher"]) == 0
    about = json.loads((out / "config.json").read_text())
    assert about["architecture"] == settings["objective"]["backbone"]
    assert (
        about["source"]["part"] == "teacher" and about["source"]["step"] == 7 and len(about["source"]["sha256"]) == 64
    )
    assert str(folder) not in (out / "README.md").read_text() + (out / "config.json").read_text()
    scope = {}
    exec(
        loader("medfast", about["architecture"])
        .replace('"model.', f'"{out}/model.')
        .replace('"config.', f'"{out}/config.'),
        scope,
    )
    weights = scope["net"].state_dict()
    assert about["parameters"] == sum(x.numel() for x in scope["net"].parameters())
    own = objective.teacher.state()
    assert weights and all(torch.equal(x, own[f"backbone.{name}"] + 1) for name, x in weights.items())

    fresh, said = config.build({**settings, "train": {"seed": 5}}), []
    start.initialise(fresh, {"from": str(out / "model.safetensors")}, said.append)
    assert "from a backbone" in said[0] and "100.0%" in said[0]
    assert all(torch.equal(x, weights[name]) for name, x in fresh.backbone.state_dict().items())


def test_init_refuses_weights_of_a_network_that_computes_something_else(run, tmp_path):
    folder, settings, _ = run
    export_weights(folder, "medfast", tmp_path / "out", say=lambda _: None)
    weights = f"init.from={tmp_path / 'out' / 'model.safetensors'}"
    config.load(DEMO, weights, "objective.backbone.drop_path=0.0", tiny=True)
    with pytest.raises(ValueError, match="clip: False there, True here.*config.json beside the weights"):
        config.load(DEMO, weights, "objective.backbone.clip=true", tiny=True)


def test_an_export_that_leaves_much_out_is_refused_unless_asked(run, tmp_path, capsys):
    folder, settings, _ = run
    assert settings["objective"]["backbone"]["semantic_attention"] is not None
    command = ["export", str(folder), "--as", "monai_swin", "--out", str(tmp_path / "out")]
    assert main(command) == 2
    assert "without 'semantic." in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert main([*command, "--partial"]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Left out" in card and "trained with clip=False, bias_index=geometric" in card
    with pytest.raises(ValueError, match="turn it round with medfast import"):
        start._weights(tmp_path / "out" / "model.safetensors", "student")


@pytest.mark.parametrize("preset, written, meant", [("btrot", "nnformer", "nnformer_encoder"),
                                                    ("sdda_mae", "dae_former", "dae_former")])  # fmt: skip
def test_weights_are_of_what_the_objective_means_by_a_name_of_both(preset, written, meant, tmp_path, capsys):
    """BTROT reads an encoder, SDDA-MAE a network: neither file may be taken for, or described as, the other."""
    settings = config.load(CONFIGS / f"{preset}.yaml", tiny=True)
    net = config.build_backbone(settings["objective"]["backbone"])
    theirs, _ = interop.to_theirs(net.state_dict(), written, settings["objective"]["backbone"])
    save_file({name: x.contiguous() for name, x in theirs.items()}, tmp_path / "public.safetensors")
    settings["objective"]["backbone"]["name"] = written
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(settings))
    out = tmp_path / "in" / "x.safetensors"
    command = ["import", str(tmp_path / "public.safetensors"), "--as", written, "--out", str(out)]
    assert main([*command, "--config", str(tmp_path / "experiment.yaml")]) == 0, capsys.readouterr().err
    about = json.loads((out.parent / "config.json").read_text())
    assert about["architecture"]["name"] == meant
    assert about["parameters"] == sum(x.numel() for x in net.parameters())
    again = config.build_backbone(about["architecture"])
    again.load_state_dict(load_file(out), strict=True)
    assert type(again) is type(net) is type(config.build(settings).backbone)
    assert all(torch.equal(x, net.state_dict()[name]) for name, x in again.state_dict().items())
