"""Steps that are not finite, and losses that jump: skipped, captured, replayed, rolled back."""

import json

import pytest
import tiny_task as task
import torch
import troubled_task as troubled
from troubled_task import SPIKE

from medfast.training import Diverged, checkpoint

OFTEN = {"train__checkpoint_every": 1, "train__keep_last": 9, "train__validate_crops": 0}
DEEPSPEED = {stage: {"train__strategy": "deepspeed", "deepspeed": {"zero_optimization": {"stage": stage}}}
             for stage in (0, 1)}  # fmt: skip
CASES = [
    ({}, {"wrong": {5: "loss"}}, "distil of rank 0, micro-batch 0"),
    ({}, {"wrong": {5: "gradient"}}, "the gradient"),
    ({}, {"inf_at": 5}, "the input of rank 0"),
    (DEEPSPEED[0], {"wrong": {5: "gradient"}}, "the gradient"),
    (DEEPSPEED[1], {"inf_at": 5}, "the input of rank 0"),
]


@pytest.mark.parametrize(("how", "fault", "words"), CASES)
def test_a_step_that_is_not_finite_changes_nothing_and_the_run_goes_on(how, fault, words, tmp_path):
    troubled.run(tmp_path, **fault, **OFTEN, **how)
    rows = task.rows(tmp_path)
    assert [row["step"] for row in rows if "skipped" in row] == [5] and words in rows[5]["skipped"]
    assert task.same(task.tensors(tmp_path, 5), task.tensors(tmp_path, 6))
    assert not task.same(task.tensors(tmp_path, 6), task.tensors(tmp_path, 7))
    assert all(x.isfinite().all() for x in task.tensors(tmp_path).values())


def test_more_skipped_steps_than_the_budget_stop_the_run(tmp_path):
    wrong = {step: "gradient" for step in range(4, 9)}
    with pytest.raises(Diverged, match=r"step 6: not finite.* 3 of the last 100 steps.*skip_budget=2"):
        troubled.run(tmp_path, wrong, train__skip_budget=2)
    assert checkpoint.latest(tmp_path).name == "step_00000004"


def test_a_resumed_run_goes_on_counting_skipped_steps(tmp_path):
    wrong = {2: "loss", 5: "loss"}
    with pytest.raises(Diverged, match="step 5"):
        troubled.run(tmp_path, wrong, train__skip_budget=1)
    with pytest.raises(Diverged, match="step 5"):
        troubled.run(tmp_path, wrong, train__skip_budget=1)
    assert len(task.rows(tmp_path)) == 6


@pytest.mark.parametrize("fault", [{"wrong": {5: "loss"}}, {"wrong": {5: "gradient"}}, {"inf_at": 5}])
def test_a_skipped_step_is_replayed_bit_for_bit_without_the_runs_checkpoints(fault, tmp_path):
    troubled.run(tmp_path, **fault, train__micro=2)
    for folder in (tmp_path / "ckpt").glob("step_*"):
        (folder / "COMPLETE").unlink()
    assert troubled.again(tmp_path, 5, **fault, train__micro=2) is True
    found = json.loads((tmp_path / "replay" / "step_00000005_rank_00000.json").read_text())
    assert found["state"] == "step_00000005" and [b["slots"] for b in found["batches"]] == [[0, 1], [2, 3]]
    from safetensors.torch import load_file

    kept = load_file(tmp_path / "replay" / "step_00000005_rank_00000.safetensors")
    assert torch.equal(kept["micro_1/view_1"], task.Memory().batch(5, [2, 3]).views[1])
    assert "micro_0/mask_1" in kept


def test_any_step_is_replayed_from_the_checkpoint_before_it(tmp_path, capsys):
    troubled.run(tmp_path, {5: "loss"})
    assert troubled.again(tmp_path, 7, {5: "loss"}) is True
    assert troubled.again(tmp_path, 2, {5: "loss"}) is True
    assert troubled.again(tmp_path, 7) is False, "without its NaN, step 5 moves the weights"
    assert "step 5 differs from the run's" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"steps 0 to 7 and ranks 0 to 0, not step 8"):
        troubled.again(tmp_path, 8)


def test_a_replay_that_sees_other_voxels_says_so(tmp_path):
    troubled.run(tmp_path, inf_at=5)
    assert troubled.again(tmp_path, 5, inf_at=None) is False


def test_a_loss_spike_rolls_back_and_its_steps_are_passed_over(tmp_path, capsys):
    troubled.run(tmp_path / "whole", **SPIKE, train__alarms={"loss_spike": "rollback"})
    said = capsys.readouterr().err
    assert "alarm loss_spike (rollback): the loss is" in said and "rolling back to step_00000040" in said
    rows = task.rows(tmp_path / "whole")
    assert [row["step"] for row in rows] == list(range(48))
    assert [row["step"] for row in rows if "passed over" in row.get("skipped", "")] == [40, 41, 42]
    quiet = {**SPIKE, "wrong": {}}
    troubled.run(tmp_path / "quiet", **quiet)
    assert task.rows(tmp_path / "quiet")[:40] == rows[:40]
    assert rows[43]["grad_norm"] != task.rows(tmp_path / "quiet")[43]["grad_norm"]
    meta = json.loads((tmp_path / "whole" / "ckpt" / "step_00000048" / "meta.json").read_text())
    assert meta["health"]["passed"] == [40, 41, 42] and meta["health"]["rollbacks"] == 1


def test_a_run_that_rolled_back_goes_on_after_a_stop_as_if_there_had_been_none(tmp_path):
    rolling = {**SPIKE, "train__alarms": {"loss_spike": "rollback"}}
    troubled.run(tmp_path / "whole", **rolling)
    for stop_at in (40, 45):  # the first is stopped before the alarm, by a checkpoint that has seen the trouble
        with pytest.raises(SystemExit):
            troubled.run(tmp_path / "parts", stop_at=stop_at, **rolling)
    troubled.run(tmp_path / "parts", **rolling)
    assert task.rows(tmp_path / "parts") == task.rows(tmp_path / "whole")
    assert task.same(task.tensors(tmp_path / "parts", 48), task.tensors(tmp_path / "whole", 48))


@pytest.mark.parametrize("stage", [0, 1])
def test_deepspeed_rolls_back_to_what_plain_training_rolls_back_to(stage, tmp_path):
    """The engine is built anew around the same parameters: nothing of the old one may hold on to them."""
    alarm = {"train__alarms": {"loss_spike": "rollback"}}
    troubled.run(tmp_path / "ddp", **SPIKE, **alarm)
    troubled.run(tmp_path / "zero", **SPIKE, **alarm, **DEEPSPEED[stage])
    assert task.drift(task.rows(tmp_path / "zero")[43:], task.rows(tmp_path / "ddp")[43:]) < 1e-5


def test_levels_of_an_alarm(tmp_path):
    troubled.run(tmp_path / "warn", **SPIKE)
    assert not any("skipped" in row for row in task.rows(tmp_path / "warn"))
    troubled.run(tmp_path / "checkpoint", **SPIKE, train__alarms={"loss_spike": "checkpoint"}, train__keep_last=9)
    assert (tmp_path / "checkpoint" / "ckpt" / "step_00000043").exists()
    for level in ("warn", "checkpoint"):
        assert len(task.rows(tmp_path / level)) == 48
    with pytest.raises(Diverged, match="median"):
        troubled.run(tmp_path / "rolled", **SPIKE, train__alarms={"loss_spike": "rollback"}, train__rollbacks=0)
    with pytest.raises(ValueError, match=r"train\.alarms\.loss_spike is one of none, warn, checkpoint, rollback, stop"):
        troubled.run(tmp_path / "wrong", train__alarms={"loss_spike": "panic"})
