"""Trouble on one of two ranks: all skip the step, and one process replays what either of them saw."""

import json

import pytest
import tiny_task as task
import troubled_task as troubled
from ranks import torchrun
from trouble_ranks import PLAIN, WRONG


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("trouble")
    torchrun("trouble_ranks.py", str(path), timeout=240)
    return path


def test_all_ranks_skip_what_one_of_them_cannot_use_and_say_which(folder):
    row = task.rows(folder / "plain")[5]
    assert row["skipped"] == "not finite: the input of rank 0, micro-batch 0"
    record = json.loads((folder / "plain" / "trouble" / "step_00000005" / "rank_00001.json").read_text())
    assert [batch["slots"] for batch in record["batches"]] == [[1], [3]]
    assert [batch["not_finite"] for batch in record["batches"]] == [[0, 0], [0, 0]]


@pytest.mark.parametrize("rank", [0, 1])
def test_one_process_plays_the_ranks_that_saw_each_others_samples(rank, folder):
    assert troubled.again(folder / "grouped", 5, rank=rank, **WRONG) is True
    assert troubled.again(folder / "plain", 5, rank=rank, **PLAIN) is True
    without = {**PLAIN, "inf_at": None}
    assert troubled.again(folder / "plain", 5, rank=rank, **without) is (rank == 1), "the voxel was rank 0's"


def test_a_step_without_a_state_of_its_own_needs_the_ranks_of_the_run(folder):
    with pytest.raises(ValueError, match="that of step 4, on 2 rank.*torchrun --nproc_per_node 2"):
        troubled.again(folder / "grouped", 7, **WRONG)
    assert [(folder / f"again_{rank}").read_text() for rank in (0, 1)] == ["True", "True"]


@pytest.mark.parametrize("stage", [2, 3])
def test_sharded_gradients_that_are_not_finite_change_nothing(stage, folder):
    run = folder / f"zero{stage}"
    assert [row["step"] for row in task.rows(run) if "skipped" in row] == [5]
    assert task.same(task.tensors(run, 5), task.tensors(run, 6))
    assert not task.same(task.tensors(run, 6), task.tensors(run, 7))


@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_roll_back_to_what_one_rolls_back_to(stage, folder, tmp_path):
    """At stage 3 a second engine cuts what the first has given back, and validation has the whole student of it."""
    spiked = {**troubled.SPIKE, "train__validate_crops": 3, "train__validate_every": 6}
    troubled.run(tmp_path, **spiked, train__alarms={"loss_spike": "rollback"})
    rows, alone = task.rows(folder / f"rolled{stage}"), task.rows(tmp_path)
    assert [row["step"] for row in rows if "skipped" in row] == [40, 41, 42]
    assert task.drift(rows[43:], alone[43:]) < 1e-5
    held_out, its = rows[-1]["validation"], alone[-1]["validation"]
    assert held_out == pytest.approx(its, rel=1e-5)
