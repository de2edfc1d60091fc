"""Disks that are full, signals at bad moments, and checkpoints that are written while the run goes on."""

import errno
import json
import signal
import threading

import pytest
import tiny_task as task

from medfast.training import SaveFailed, checkpoint, pretrain


def names(run):
    return sorted(path.name for path in (run / "ckpt").iterdir())


@pytest.fixture
def full(monkeypatch):
    """A disk that is full when the checkpoint of step 8 has written some of its files."""
    sync = checkpoint._sync

    def refuse(path):
        if "00000008" in str(path) and path.suffix == ".safetensors":
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(path)

    monkeypatch.setattr(checkpoint, "_sync", refuse)
    return lambda: monkeypatch.setattr(checkpoint, "_sync", sync)


def test_a_full_disk_leaves_the_previous_checkpoint_and_a_sentence(tmp_path, full):
    with pytest.raises(SaveFailed, match=r"could not be written: .*No space left.* make room"):
        task.run(tmp_path / "full")
    assert names(tmp_path / "full") == ["latest", "step_00000004"], "nothing half-written keeps the disk full"
    full()
    task.run(tmp_path / "full")
    task.run(tmp_path / "whole")
    assert task.same(task.tensors(tmp_path / "full"), task.tensors(tmp_path / "whole"))


def test_a_checkpoint_that_fails_in_the_middle_of_a_run_ends_it_there(tmp_path, full):
    with pytest.raises(SaveFailed):
        task.run(tmp_path, train__steps=400)
    assert 8 < len(task.rows(tmp_path)) < 100


def test_a_folder_that_cannot_be_made_is_a_sentence_too(tmp_path):
    (tmp_path / "ckpt").write_text("in the way")
    with pytest.raises(SaveFailed, match="could not be written"):
        task.run(tmp_path)


def test_safetensors_own_error_of_a_full_disk_is_one_of_the_disk(tmp_path, monkeypatch):
    import safetensors.torch
    from safetensors import SafetensorError

    def refuse(*_):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", refuse)
    with pytest.raises(SaveFailed, match=r"student\.safetensors: I/O error: No space left"):
        task.run(tmp_path)


class Gated(task.Memory):
    """Tells when a step is asked for."""

    def __init__(self):
        super().__init__()
        self.asked, self.signal_at = threading.Event(), None

    def batch(self, step, slots):
        if step == 6:
            self.asked.set()
        if step == self.signal_at:
            signal.raise_signal(signal.SIGTERM)
        return super().batch(step, slots)


@pytest.fixture
def gated(monkeypatch):
    """Nothing of step 4 is on the disk before step 6 is asked for: steps go on while it is written."""
    stream, save, slept = Gated(), checkpoint.save, []

    def late(run, step, *rest, **others):
        if step == 4:
            slept.append(stream.asked.wait(60))
        return save(run, step, *rest, **others)

    monkeypatch.setattr(checkpoint, "save", late)
    return stream, slept


def run_gated(out, stream, **changes):
    pretrain(task.build(), task.config(out, **changes), stream, task.Memory(split=1))


def test_training_goes_on_while_a_checkpoint_is_written_and_does_not_change_it(tmp_path, gated):
    stream, slept = gated
    run_gated(tmp_path / "late", stream)
    assert slept == [True]
    task.run(tmp_path / "soon", train__strategy="ddp")
    for step in (4, 8):
        assert task.same(task.tensors(tmp_path / "late", step), task.tensors(tmp_path / "soon", step))


def test_a_signal_while_a_checkpoint_is_written_saves_and_exits_75(tmp_path, gated):
    stream, _ = gated
    stream.signal_at = 5
    stream.asked.set()
    with pytest.raises(SystemExit) as stop:
        run_gated(tmp_path, stream)
    assert stop.value.code == 75
    assert checkpoint.latest(tmp_path).name == f"step_{len(task.rows(tmp_path)):08d}"


def test_the_time_that_saving_takes_from_training_is_in_the_next_row(tmp_path):
    task.run(tmp_path)
    rows = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["time"]["save_s"] > 0 for row in rows] == [step == 4 for step in range(8)]


def test_every_so_many_checkpoints_stay(tmp_path):
    task.run(tmp_path, train__checkpoint_every=1, train__keep_last=2, train__keep_every=3)
    assert names(tmp_path) == ["latest", *(f"step_{step:08d}" for step in (3, 6, 7, 8))]


def test_a_checkpoint_says_where_the_data_go_on(tmp_path):
    task.run(tmp_path, train__keep_last=3)
    for name in [name for name in names(tmp_path) if name != "latest"]:
        meta = json.loads((tmp_path / "ckpt" / name / "meta.json").read_text())
        assert meta["cursor"] == {"step": int(name.removeprefix("step_")), "slot": 0} and meta["ranks"] == 1


def test_checkpoints_after_a_step_are_dropped_the_newest_first(tmp_path, monkeypatch):
    task.run(tmp_path, train__checkpoint_every=2, train__keep_last=9)
    seen, rename = [], checkpoint.Path.rename
    monkeypatch.setattr(checkpoint.Path, "rename", lambda path, to: seen.append(path.name) or rename(path, to))
    checkpoint.drop_after(tmp_path, 4)
    assert seen == ["step_00000008", "step_00000006"]
    assert [name for name in names(tmp_path) if name.startswith("step")] == ["step_00000002", "step_00000004"]
