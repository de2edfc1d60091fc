"""Two ranks against one, and against themselves after a stop."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_task as task

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SMALL = {"optim__lr": 1e-6, "optim__min_lr": 1e-7, "train__steps": 10}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("two")
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in [str(ROOT / "kernels"), str(ROOT)])}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*launch, str(HERE / "two_ranks.py"), str(path), "ddp", "zero0", "zero1"], env=env,
                          capture_output=True, text=True, timeout=75)  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return path


def test_plain_all_reduce_in_fp64_gives_the_losses_of_one_rank(folder, tmp_path):
    task.run(tmp_path, train__precision="fp64", train__steps=10)
    assert task.drift(task.rows(folder / "ddp"), task.rows(tmp_path)) < 1e-9


@pytest.mark.parametrize("case", ["zero0", "zero1"])
def test_deepspeed_in_fp32_gives_the_losses_of_one_rank(case, folder, tmp_path):
    task.run(tmp_path, **SMALL)
    assert task.drift(task.rows(folder / f"{case}_small"), task.rows(tmp_path)) < 1e-5


@pytest.mark.parametrize("case", ["zero0", "zero1"])
def test_stopped_and_resumed_equals_uninterrupted_bit_for_bit(case, folder):
    assert [(folder / f"{case}_exit_{rank}").read_text() for rank in (0, 1)] == ["75", "75"]
    assert task.rows(folder / f"{case}_parts") == task.rows(folder / f"{case}_whole")
    assert task.same(task.tensors(folder / f"{case}_parts"), task.tensors(folder / f"{case}_whole"))


@pytest.mark.parametrize("case", ["ddp", "zero0", "zero1"])
def test_parameters_teacher_and_centres_are_equal_on_all_ranks(case, folder):
    first, second = ((folder / f"{case}_rank_{rank}").read_bytes() for rank in (0, 1))
    assert len(first) > 1000 and first == second


def test_stages_share_checkpoints(folder):
    """Moments gathered from ZeRO-1's shards are those that ZeRO-0 has."""
    zero0, zero1 = (task.tensors(folder / f"{case}_small", 10) for case in ("zero0", "zero1"))
    assert zero0.keys() == zero1.keys()
    for name, tensor in zero0.items():
        assert tensor.sub(zero1[name]).abs().max() <= 1e-5 * tensor.abs().max(), name
