"""Checkpoints are there as a whole or not at all, and carry everything."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_task as task

from medfast.training import checkpoint

ROOT = Path(__file__).parents[2]
KILL = """
import os, signal, sys
import tiny_task as task
from medfast.training import checkpoint
calls, sync = 0, checkpoint._sync
def die(path):
    global calls
    calls += 1
    sync(path)
    if calls == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
checkpoint._sync = die
parts = {**checkpoint.describe(task.build(1)), "optimizer": {}}
checkpoint.save(sys.argv[1], 12, parts, {}, keep=3)
"""


def killed_at(run, sync: int) -> None:
    """Save step 12 in a process that dies after so many syncs: 6 files, COMPLETE, their folder, the names."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT / "kernels", ROOT, Path(__file__).parent)))}
    died = subprocess.run([sys.executable, "-c", KILL, str(run), str(sync)], env=env, timeout=60)
    assert died.returncode == -9


@pytest.mark.parametrize("sync", [1, 5, 7])
def test_kill_while_writing_leaves_the_previous_one_usable(tmp_path, sync):
    old = {**checkpoint.describe(task.build(0)), "optimizer": {}}
    checkpoint.save(tmp_path, 8, old, {"seed": 0}, keep=3)
    killed_at(tmp_path, sync)
    newest = checkpoint.latest(tmp_path)
    assert newest is not None and newest.name == "step_00000008"
    assert checkpoint.read_into(task.build(3), newest)["seed"] == 0


@pytest.mark.parametrize("damage", ["complete", "bit", "file"])
def test_damaged_checkpoint_is_passed_over_with_a_reason(tmp_path, damage):
    parts = {**checkpoint.describe(task.build()), "optimizer": {}}
    for step in (4, 8):
        checkpoint.save(tmp_path, step, parts, {}, keep=3)
    folder = tmp_path / "ckpt" / "step_00000008"
    if damage == "complete":
        (folder / "COMPLETE").unlink()
    elif damage == "file":
        (folder / "teacher.safetensors").unlink()
    else:
        blob = bytearray((folder / "student.safetensors").read_bytes())
        blob[-3] ^= 1
        (folder / "student.safetensors").write_bytes(blob)
    said = []
    assert checkpoint.latest(tmp_path, said.append).name == "step_00000004"
    assert len(said) == 1 and "step_00000008" in said[0]


def test_damaged_leftovers_never_push_out_usable_checkpoints(tmp_path):
    """A later folder that could not be read, and one that was never finished, count for nothing."""
    parts = {**checkpoint.describe(task.build()), "optimizer": {}}
    root, said = tmp_path / "ckpt", []
    for step in (4, 20, 24):
        checkpoint.save(tmp_path, step, parts, {}, keep=3)
    for name in ("step_00000020", "step_00000024"):
        (root / name / "meta.json").write_text("damaged")
    (root / "step_00000006").mkdir()
    checkpoint.save(tmp_path, 8, parts, {}, keep=2, say=said.append)
    assert checkpoint.latest(tmp_path).name == "step_00000008"
    assert sorted(p.name for p in root.glob("step_*")) == ["step_00000004", "step_00000008"]
    assert [line.split()[1] for line in said] == ["step_00000024", "step_00000020", "step_00000006"]


def test_kill_while_replacing_the_only_checkpoint_leaves_one(tmp_path):
    checkpoint.save(tmp_path, 12, {**checkpoint.describe(task.build(0)), "optimizer": {}}, {}, keep=3)
    killed_at(tmp_path, 9)
    assert checkpoint.latest(tmp_path).stem == "step_00000012"


def test_a_replaced_checkpoint_is_there_at_every_moment(tmp_path, monkeypatch):
    parts, seen = {**checkpoint.describe(task.build()), "optimizer": {}}, []
    checkpoint.save(tmp_path, 4, parts, {"try": 1}, keep=1)
    rename = Path.rename

    def watched(self, target):
        rename(self, target)
        seen.append(checkpoint.load(checkpoint.latest(tmp_path))[1]["try"])

    monkeypatch.setattr(Path, "rename", watched)
    checkpoint.save(tmp_path, 4, parts, {"try": 2}, keep=1)
    assert seen == [1, 2]
    assert [p.name for p in (tmp_path / "ckpt").glob("step_*")] == ["step_00000004"]


def test_round_trip_and_retention(tmp_path):
    objective, other = task.build(0), task.build(5)
    parts = {**checkpoint.describe(objective), "optimizer": {}}
    for step in range(1, 6):
        checkpoint.save(tmp_path, step, parts, {}, keep=2)
    assert sorted(p.name for p in (tmp_path / "ckpt").glob("step_*")) == ["step_00000004", "step_00000005"]
    assert (tmp_path / "ckpt" / "latest").read_text().strip() == "step_00000005"
    checkpoint.read_into(other, checkpoint.latest(tmp_path))
    assert task.same(objective.state_dict(), other.state_dict())
    assert task.same(objective.teacher.state(), other.teacher.state())
