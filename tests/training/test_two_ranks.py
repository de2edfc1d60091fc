"""Two ranks against one, and against themselves after a stop."""

from pathlib import Path

import pytest
import tiny_task as task
from ranks import torchrun
from two_ranks import CLIP, SMALL

ZERO = ["zero0", "zero1", "zero2", "zero3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("two")
    torchrun("two_ranks.py", str(path), "ddp", *ZERO, timeout=75)
    return path


def test_plain_all_reduce_in_fp64_gives_what_one_rank_gives(folder, tmp_path):
    task.run(tmp_path, train__precision="fp64", train__steps=10, optim__clip=CLIP)
    assert task.drift(task.rows(folder / "ddp"), task.rows(tmp_path)) < 1e-9
    assert task.apart(folder / "ddp", tmp_path) < 1e-8


def test_deepspeed_in_fp32_gives_what_one_rank_gives(folder, tmp_path):
    """The other stages are compared on three ranks, in test_zero."""
    task.run(tmp_path, **SMALL)
    assert task.drift(task.rows(folder / "zero0_small"), task.rows(tmp_path)) < 1e-5
    assert task.apart(folder / "zero0_small", tmp_path) < 1e-4


@pytest.mark.parametrize("case", ZERO)
def test_stopped_and_resumed_equals_uninterrupted_bit_for_bit(case, folder):
    assert [(folder / f"{case}_exit_{rank}").read_text() for rank in (0, 1)] == ["75", "75"]
    assert task.rows(folder / f"{case}_parts") == task.rows(folder / f"{case}_whole")
    assert task.same(task.tensors(folder / f"{case}_parts"), task.tensors(folder / f"{case}_whole"))


@pytest.mark.parametrize("case", ["ddp", *ZERO])
def test_parameters_teacher_and_centres_are_equal_on_all_ranks(case, folder):
    first, second = ((folder / f"{case}_rank_{rank}").read_bytes() for rank in (0, 1))
    assert len(first) > 1000 and first == second
