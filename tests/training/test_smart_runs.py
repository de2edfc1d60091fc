"""SMART on a prepared store: stopped and resumed on one rank and on two, and two ranks against one."""

from pathlib import Path

import pytest
import smart_task as smart
import tiny_task as task
from ranks import torchrun

from medfast.data.phantom import write_phantoms
from medfast.data.prepare import prepare

ZERO = ("zero0", "zero3")


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("phantoms")
    write_phantoms(folder / "nifti", 2)
    prepare(folder / "nifti", folder / "store", spacing=4.0, jobs=1, progress=False)
    return folder / "store"


@pytest.fixture(scope="module")
def two(store, tmp_path_factory) -> Path:
    """Runs on two ranks."""
    folder = tmp_path_factory.mktemp("two")
    torchrun("smart_task.py", str(store), str(folder), "ddp", *ZERO)
    return folder


@pytest.fixture(scope="module")
def one(store, tmp_path_factory) -> Path:
    """The same on one rank."""
    folder = tmp_path_factory.mktemp("one")
    smart.run(store, folder / "ddp", smart.FP64)
    smart.run(store, folder / "slow", smart.SLOW)
    return folder


def test_one_rank_stopped_and_resumed_equals_uninterrupted_bit_for_bit(store, tmp_path):
    smart.run(store, tmp_path / "whole")
    _, code = smart.interrupted(store, tmp_path / "parts")
    assert code == 75
    same_run(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.parametrize("case", ZERO)
def test_two_ranks_stopped_and_resumed_equal_uninterrupted_bit_for_bit(case, two):
    assert [(two / f"{case}_exit_{rank}").read_text() for rank in (0, 1)] == ["75", "75"]
    same_run(two / f"{case}_parts", two / f"{case}_whole")


def test_plain_all_reduce_in_fp64_gives_what_one_rank_gives(one, two):
    assert len(task.rows(two / "ddp")) == 10
    assert task.drift(task.rows(two / "ddp"), task.rows(one / "ddp")) < 1e-9
    assert task.apart(two / "ddp", one / "ddp") < 1e-7


@pytest.mark.parametrize("case", ZERO)
def test_deepspeed_in_fp32_gives_what_one_rank_gives(case, one, two):
    assert len(task.rows(two / f"{case}_slow")) == 10
    assert task.drift(task.rows(two / f"{case}_slow"), task.rows(one / "slow")) < 1e-5
    assert task.apart(two / f"{case}_slow", one / "slow") < 1e-3


@pytest.mark.parametrize("case", ["ddp", *ZERO])
def test_student_teacher_and_centres_are_equal_on_all_ranks(case, two):
    first, second = ((two / f"{case}_rank_{rank}").read_bytes() for rank in (0, 1))
    assert len(first) > 1000 and first == second


def same_run(a: Path, b: Path) -> None:
    assert [row["step"] for row in task.rows(a)] == list(range(smart.STEPS))
    assert task.rows(a) == task.rows(b)
    assert task.same(task.tensors(a, smart.STEPS), task.tensors(b, smart.STEPS))
