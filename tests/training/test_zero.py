"""ZeRO stages against plain all-reduce and against themselves, on three ranks: see zero_ranks for what is run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks import HERE, ROOT

from medfast.training import deepspeed_engine
from medfast.training.settings import Optim, Train

STAGES = (0, 1, 2, 3)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Name of a way -> what a checkpoint would hold at its end, by part."""
    folder = tmp_path_factory.mktemp("zero")
    path = os.pathsep.join(map(str, (ROOT / "kernels", ROOT, HERE)))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": path}
    command = [sys.executable, str(HERE / "zero_ranks.py"), str(folder)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return {file.stem: torch.load(file, weights_only=True) for file in Path(folder).glob("*.pt")}


def differing(a: dict, b: dict, *parts: str) -> list[str]:
    """Names of tensors that are not the same bit for bit."""
    assert a.keys() == b.keys()
    odd = []
    for part in parts or tuple(a):
        assert a[part].keys() == b[part].keys()
        odd += [f"{part}/{name}" for name, x in a[part].items() if not torch.equal(x, b[part][name])]
    return odd


def apart(a: dict, b: dict) -> float:
    """Largest difference of any tensor, relative to its largest element."""
    assert a.keys() == b.keys() and all(a[part].keys() == b[part].keys() for part in a)
    pairs = [(x, b[part][name]) for part in a for name, x in a[part].items()]
    return max(float((x - y).abs().max() / y.abs().max().clamp_min(1e-12)) for x, y in pairs)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("clip", ["", " global", " loud"])
def test_every_stage_gives_what_plain_all_reduce_gives(stage, clip, found):
    """Accumulation, clipping of either kind, frozen and idle parameters, moments: everything but rounding."""
    assert apart(found[f"{stage}{clip}"], found[f"ddp{clip}"]) < 2e-5
    assert found["ddp"]["run"]["norm"].min() > 0.05  # or nothing was clipped
    assert found["ddp loud"]["run"]["norm"].min() > 20.0  # nothing may be, though DeepSpeed would


@pytest.mark.parametrize("stage", [*STAGES, "ddp"])
def test_a_teacher_in_pieces_is_the_whole_one_bit_for_bit(stage, found):
    assert not differing(found[f"{stage} sharded"], found[f"{stage}"])
    average, student = (found[f"{stage}"][part] for part in ("teacher", "student"))
    assert all(not torch.equal(x, student[name]) for name, x in average.items() if name.startswith("backbone"))


@pytest.mark.parametrize("stage", STAGES)
def test_a_replica_in_16_bits_teaches_the_same_under_autocast(stage, found):
    """Losses and so everything else; the average itself is kept in fp32."""
    assert not differing(found[f"{stage} bf16 sharded"], found[f"{stage} bf16 replicated"])
    assert differing(found[f"{stage} bf16 sharded"], found[f"{stage}"], "run")
    assert {x.dtype for x in found[f"{stage} bf16 sharded"]["teacher"].values()} == {torch.float32}


@pytest.mark.parametrize("stage", STAGES)
def test_a_gradient_that_is_not_finite_moves_nothing(stage, found):
    """On no rank, though one alone has it, and nothing of it is left for the next step."""
    assert not differing(found[f"{stage} bad"], found[f"{stage} missing"], "student", "teacher", "optimizer", "state")
    assert differing(found[f"{stage}"], found[f"{stage} missing"], "student")


@pytest.mark.parametrize("stage", STAGES)
def test_closed_and_opened_again_it_goes_on_bit_for_bit(stage, found):
    assert not differing(found[f"{stage} again"], found[f"{stage}"])


@pytest.mark.parametrize("stage", STAGES[1:])
def test_offloaded_moments_change_nothing(stage, found):
    assert not differing(found[f"{stage} offload"], found[f"{stage}"])


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_evaluated_has_the_whole_student(stage, found):
    for name, x in found[f"{stage}"]["student"].items():
        assert torch.equal(found[f"{stage}"]["student (evaluated)"][name], x), name


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"stage": 4}, "one of 0, 1, 2, 3, got 4"),
        ({"stage": True}, "got True"),
        ({"stage": 3, "offload_param": {"device": "cpu"}}, "offload_param: leave it out"),
        ({"stage": 3, "zero_quantized_weights": True}, "or be rounded"),
        ({"stage": 2, "offload_optimizer": {"device": "nvme"}}, "is {device: cpu}"),
        ({"offload_optimizer": {"device": "cpu"}}, "stage 0 ignores it"),
    ],
)
def test_what_would_not_resume_is_refused(section, words):
    with pytest.raises(ValueError, match=words):
        deepspeed_engine.check({"zero_optimization": section}, Optim(), Train())


def test_settings_that_ours_decide_are_refused():
    with pytest.raises(ValueError, match=r"objective\.backbone\.checkpoint"):
        deepspeed_engine.check({"activation_checkpointing": {}}, Optim(), Train())
    with pytest.raises(ValueError, match="train.teacher is one of auto, replicated, sharded, got 'half'"):
        Train(teacher="half")
