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
    assert objective.views in (1, 2)
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


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.clip=0.3", "optim.clip must be a section of key: value or null, got 0.3"),
        ("optim.clip={kind: global, max: abc}", "max: a norm above 0"),
        ("optim.lr=abc", "optim.lr must be a number, got 'abc'"),
        ("optim.lr=.inf", "optim.lr must be a number, got inf"),
        ("optim.warmup=null", "optim.warmup must be a number, got None"),
        ("optim.frozen=3", "optim.frozen must be a section"),
        ("optim.frozen={a: b}", "optim.frozen must be a section"),
        ("optim.betas=[a, b]", "optim.betas[0] must be a number, got 'a'"),
        ("optim.betas=[0.9, 1.5]", "optim.betas are two numbers in [0, 1)"),
        ("objective.weights=0.1", "objective.weights must be a section"),
        ("objective.mask=random", "objective.mask must be a section like {name: ...}, got 'random'"),
        ("objective.backbone=null", "objective.backbone must be"),
        ("objective.head_widths=256", "objective.head_widths must be a list, of a whole number each, got 256"),
        ("objective.momentum=[0.9]", "objective.momentum must be [a number, a number], got [0.9]"),
        ("objective.backbone.depths=[2, 2.5, 8, 2]", "objective.backbone.depths[1] must be a whole number, got 2.5"),
        ("objective=3", "objective must be a section like"),
        ("deepspeed=3", "deepspeed must be a section"),
        ("deepspeed.zero_optimization=1", "deepspeed.zero_optimization must be a section"),
        ("deepspeed.zero_optimization.stage=true", "stage is one of 0, 1, 2, 3, got True"),
        ("deepspeed.zero_optimisation.stage=1", "did you mean 'zero_optimization'"),
        ("deepspeed.gradient_clipping=1", "optim.clip decides that"),
        ("train.validate_every=abc", "train.validate_every must be a whole number, got 'abc'"),
        ("train.micro=1.5", "train.micro must be a whole number or null, got 1.5"),
        ("train.resume_changed=nope", "train.resume_changed must be true or false, got 'nope'"),
        ("train.resume=perhaps", "train.resume is one of auto, never, must"),
        ("train.seed=true", "train.seed must be a whole number, got True"),
        ("train=null", "train must be a section of key: value lines, got None"),
        ("data=null", "data must be a section of key: value lines, got None"),
        ("data.executor=[torch]", "data.executor must be text, got ['torch']"),
        ("data.size=abc", "data.size must be a whole number or a list"),
        ("init.part=teacher", "init.from is missing"),
        ("init={from: runs/a, part: pupil}", "init.part is student or teacher"),
        ("init=runs/a", "init must be a section"),
        ("out=3", "out must be text or null, got 3"),
        ("optim.lr=[1", "no valid YAML"),
    ],
)
@pytest.mark.parametrize("tiny", [False, True])
def test_values_of_the_wrong_kind_are_one_sentence(override, words, tiny, capsys, monkeypatch):
    monkeypatch.setattr(config, "build", lambda config: pytest.fail("work began"))
    arguments = ["pretrain", str(SMART), "out=/nonexistent", "data.store=/nonexistent", override]
    assert main([*arguments, *["--tiny"] * tiny]) == 2
    message = capsys.readouterr().err
    assert words in message and message.count("\n") == 1


def test_files_of_the_wrong_shape_are_one_sentence(tmp_path, capsys):
    file = tmp_path / "odd.yaml"
    for text, words in [
        ("objective: smart", "objective must be a section like"),
        ("objective: {name: [smart]}", "no objective called"),
        ("objective: {name: smart, backbone: swin}", "objective.backbone must be a section like"),
        ("objective: {name: smart, backbone: {name: swin, heads: 4}}", "heads must be a list"),
        ("objective: {name: smart}\ntrain:", "train must be a section"),
        ("objective: {name: smart}\ndata: 3", "data must be a section"),
    ]:
        file.write_text(text)
        assert main(["pretrain", str(file), "--tiny", "--steps", "3", "out=/nonexistent"]) == 2
        message = capsys.readouterr().err
        assert words in message and message.count("\n") == 1


def test_whole_floats_become_ints():
    loaded = config.load(SMART, "train.steps=1e3", "train.batch=8.0", "objective.prototypes=1e3", "data.size=64.0")
    found = [loaded["train"]["steps"], loaded["train"]["batch"], loaded["objective"]["prototypes"]]
    assert found + [loaded["data"]["size"]] == [1000, 8, 1000, 64]
    assert all(type(x) is int for x in [*found, loaded["data"]["size"]])
    assert loaded["optim"]["lr"] == 8e-4 and loaded["objective"]["patch_temperature"][1] == [0.0375, 0.04]


def test_what_only_deepspeed_cannot_run_is_no_matter_to_ddp():
    demo = SMART.with_name("demo.yaml")
    compiled = ["train.compile=true", "deepspeed.zero_optimization.stage=3"]
    assert config.load(demo, *compiled, "train.strategy=ddp")["train"]["compile"] is True
    with pytest.raises(ValueError, match="use deepspeed.zero_optimization.stage 0, 1 or 2"):
        config.load(demo, *compiled)


def test_defaults_of_training_are_written_out(tmp_path):
    (tmp_path / "short.yaml").write_text("objective: {name: smart}")
    loaded = config.load(tmp_path / "short.yaml", "train.seed=3")
    assert loaded["train"]["batch"] == 8 and loaded["train"]["seed"] == 3 and loaded["optim"]["warmup"] == 0.1
    assert config.train_settings(loaded).batch == 8 and config.train_settings({}).seed == 0


def test_every_deepspeed_key_in_its_own_words_is_known():
    """What DeepSpeed reads from its configuration is what we let through, but for what our sections decide."""
    runtime = pytest.importorskip("deepspeed.runtime.config")
    from medfast.training import deepspeed_engine

    read = set()

    class Recorder(dict):
        def get(self, key, default=None):
            return default if read.add(key) is None else None

        def __contains__(self, key):
            return read.add(key) is not None

        def keys(self):
            return self

    blank = runtime.DeepSpeedConfig.__new__(runtime.DeepSpeedConfig)
    blank._initialize_params(Recorder(train_batch_size=1))
    renamed = {"bfloat16"}  # an old name of bf16
    assert read - renamed == deepspeed_engine._THEIRS | set(deepspeed_engine._OURS)
