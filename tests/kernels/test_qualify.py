"""Verdicts: what is found right and fast, where it is kept, and what it changes. Tuning: what it keeps is read."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import medfast_kernels as mk
from medfast_kernels import _dispatch, _evidence, _examples, _qualify
from medfast_kernels.__main__ import main

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
cpp_only = pytest.mark.skipif(_dispatch.WHY_NO_CPP is not None, reason=str(_dispatch.WHY_NO_CPP))


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MEDFAST_CACHE", str(tmp_path))
    monkeypatch.delenv("MEDFAST_BACKEND", raising=False)
    _dispatch.forget()
    yield
    _dispatch.forget()


def row(ms, correct=True):
    return {"correct": correct, "ms": ms, "reference_ms": 10.0}


def test_every_operator_has_examples_and_one_that_is_timed():
    assert set(_examples._MAKERS) == set(_dispatch.OPERATORS)
    assert all(len(_examples.examples(operator, large=True)) == 1 for operator in _dispatch.OPERATORS)


@cpp_only
@pytest.mark.parametrize("operator", _dispatch.OPERATORS)
def test_the_kernels_that_are_there_are_right(operator):
    """The budget of this project: errors at most twice (gradients three times) those of eager in the same precision."""
    for name in _dispatch.KERNELS[operator]:
        if _dispatch.why_not(operator, name, CPU) is None:
            assert _qualify._checked(operator, name, CPU).why is None


@cpp_only
@pytest.mark.parametrize("off", [1e-3, float("nan")])
def test_a_wrong_value_or_gradient_is_found(monkeypatch, off):
    example = _examples.examples("drop_tokens")[0]
    results = _qualify.results
    for what in ("value 0", "gradient of x", "gradient of position"):

        def broken(example, name, dtype, device, what=what):
            made = results(example, name, dtype, device)
            if name == "cpp":
                made[what].view(-1)[3] += off
            return made

        monkeypatch.setattr(_qualify, "results", broken)
        assert f"{what}: " in _qualify.check(example, "cpp", torch.float32, CPU).why
        monkeypatch.setattr(_qualify, "results", results)


@cpp_only
def test_exact_operators_are_held_to_every_bit(monkeypatch):
    example = _examples.examples("random_uniform")[0]
    results = _qualify.results

    def broken(example, name, dtype, device):
        return {what: x * (1 + 2.0**-20 * (name == "cpp")) for what, x in results(example, name, dtype, device).items()}

    assert _qualify.check(example, "cpp", torch.float32, CPU) == (0.0, None)
    monkeypatch.setattr(_qualify, "results", broken)
    assert "allowed 0.0e+00" in _qualify.check(example, "cpp", torch.float32, CPU).why


@cpp_only
def test_a_verdict_is_kept_and_decides(capsys, monkeypatch):
    monkeypatch.setattr(_qualify, "milliseconds", lambda runs, *_: {name: 1.0 + len(name) for name in runs})
    assert main(["qualify", "random_keep", "philox_words"]) == 0
    assert capsys.readouterr().out.count("right (0% of the budget)") == 2
    kept = json.loads(_evidence.verdict_path(CPU).read_text())
    assert kept["operators"]["random_keep"]["cpp"] == {"correct": True, "share of budget": 0.0, "ms": 4.0,
                                                       "reference_ms": 10.0}  # fmt: skip
    assert kept["build"] == _evidence.build_hash() and kept["torch"] == torch.__version__
    assert _dispatch.choose("random_keep", CPU) == "cpp"
    monkeypatch.setattr(_qualify, "milliseconds", lambda runs, *_: {name: 20.0 - len(name) for name in runs})
    main(["qualify", "random_keep"])  # now it is slower than the reference
    assert _dispatch.choose("random_keep", CPU) == "reference" and _dispatch.choose("philox_words", CPU) == "cpp"
    with mk.backend("cpp"):
        assert _dispatch.choose("random_keep", CPU) == "cpp"
    monkeypatch.setattr(_qualify, "results", lambda *_: 1 / 0)
    with pytest.raises(SystemExit):
        main(["qualify", "random_walk"])
    assert "no operator random_walk; there are window_attention" in capsys.readouterr().err


@cpp_only
def test_a_backend_that_breaks_is_wrong_and_never_chosen(capsys, monkeypatch):
    def broken(example, name, dtype, device):
        raise ZeroDivisionError("lost")

    monkeypatch.setattr(_qualify, "check", broken)
    assert main(["qualify", "random_keep"]) == 0
    assert "WRONG: draw, float32: ZeroDivisionError: lost" in capsys.readouterr().out
    assert _dispatch.choose("random_keep", CPU) == "reference"


def test_a_verdict_that_cannot_be_read_is_named():
    _evidence.store(_evidence.verdict_path(CPU), {"operators": 3})
    _evidence.verdict_path(CPU).write_text("{")
    with pytest.raises(ValueError, match="is no verdict .* delete it"):
        _evidence.evidence(CPU)


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """As if there were one of a family of my choice; returns the folder of shipped verdicts."""
    monkeypatch.setattr(_evidence, "device_name", lambda device: "GPU 9000 (tm)")
    monkeypatch.setattr(_evidence, "family", lambda device: "sm_80")
    monkeypatch.setattr(_evidence, "build_hash", lambda: "b0b")
    monkeypatch.setattr(_evidence, "HERE", tmp_path)
    monkeypatch.setitem(_dispatch.KERNELS, "window_attention", ("cpp", "triton", "cuda"))
    monkeypatch.setattr(_dispatch, "why_not", lambda _, name, device: None if name != "cpp" else "on CPU only")
    return tmp_path / "_verdicts"


def chosen():
    _dispatch.forget()
    return _dispatch.choose("window_attention", GPU, {})


def test_evidence_of_the_device_goes_before_that_of_its_family_and_of_the_next(gpu):
    _evidence.store(gpu / "sm_90.json", {"operators": {"window_attention": {"triton": row(3.0), "cuda": row(4.0)}}})
    assert chosen() == "triton" and _evidence.evidence(GPU)[0].inferred
    _evidence.store(gpu / "sm_80.json", {"operators": {"window_attention": {"triton": row(3.0), "cuda": row(2.0)}}})
    assert chosen() == "cuda" and not _evidence.evidence(GPU)[0].inferred
    assert _evidence.verdict_path(GPU).name == f"gpu-9000-tm-torch-{torch.__version__}-b0b.json"
    own = {"triton": row(3.0, correct=False), "cuda": row(11.0)}  # wrong; slower than the reference
    _evidence.store(_evidence.verdict_path(GPU), {"operators": {"window_attention": own}})
    assert chosen() == "reference"
    _evidence.store(_evidence.verdict_path(GPU), {"operators": {"random_keep": {}}})  # says nothing of this operator
    assert chosen() == "cuda"
    with pytest.warns(UserWarning, match="window_attention does not run on cuda here: 65 tokens"):
        assert _dispatch.choose("window_attention", GPU, {"cuda": "65 tokens"}) == "triton"


def test_a_file_is_replaced_whole(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "verdict.json"
    _evidence.store(path, {"a": 1})
    monkeypatch.setattr(Path, "replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        _evidence.store(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}


@pytest.mark.parametrize("command", ["qualify", "tune"])
def test_nothing_is_timed_in_the_interpreter(command, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit, match="2"):
        main([command])
    assert "unset TRITON_INTERPRET" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tuning_needs_a_gpu(capsys):
    assert main(["tune"]) == 2
    assert "on an NVIDIA GPU, and torch finds none here" in capsys.readouterr().err


def test_what_tuning_finds_is_read_by_the_kernels(tmp_path):
    """In Triton's interpreter, with times of my own making."""
    pytest.importorskip("triton")
    code = """
import torch
from medfast_kernels import _tune
from medfast_kernels._triton import window_config
from medfast_kernels._triton.window_config import Config, config
cpu, seen = torch.device("cpu"), []
def milliseconds(runs, device, seconds):
    runs["run"]()
    trial = dict(window_config.trials)
    seen.append(trial)
    if trial.get("window_attention") == Config(8, 1, 1):
        raise RuntimeError("out of resource: shared memory")
    return {"run": 9.0 - sum(trial.popitem()[1])}
_tune.milliseconds = milliseconds
before = config("window_attention", 12, 8, torch.float32, cpu)
candidates = [Config(2, 1, 1), Config(4, 1, 1), Config(8, 1, 1)]
path = _tune.tune(cpu, [_tune.Shape(1, (2, 2, 2), 2, 1, 12)], [torch.float32], candidates)
assert path.name == "tuned.json" and len(seen) == 6 and not window_config.trials
assert config("window_attention", 12, 8, torch.float32, cpu) == Config(4, 1, 1) != before
assert config("window_attention_backward", 12, 8, torch.float32, cpu) == Config(8, 1, 1)
assert config("window_attention", 12, 27, torch.float32, cpu) == before
"""
    kernels = str(_dispatch._LIBRARY.parents[1])
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": kernels}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
