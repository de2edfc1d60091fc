"""What is on the disk when, what earlier deaths left there, and which error a run ends with."""

import json
import threading
from types import SimpleNamespace

import pytest
import tiny_task as task
import torch

from medfast.training import SaveFailed, checkpoint, saving
from medfast.training.health import Diverged
from medfast.training.verdict import Verdict
from medfast.training.writer import Writer

STEP = "step_00000004"


def parts(seed: int = 0) -> dict:
    return {**checkpoint.describe(task.build(seed)), "optimizer": {}}


def refuse(error: Exception):
    def write():
        raise error

    return write


def test_what_a_writer_failed_at_is_raised_once():
    with Writer() as writer:
        writer.start(refuse(OSError("full")))
        with pytest.raises(SaveFailed, match="could not be written: full") as found:
            writer.wait()
        assert isinstance(found.value.__cause__, OSError) and not writer.failed
        writer.wait()


def test_the_next_checkpoint_waits_and_hears_of_the_last_one():
    with Writer() as writer:
        writer.start(refuse(OSError("full")))
        with pytest.raises(SaveFailed):
            writer.start(lambda: pytest.fail("it must not be written"))


def test_an_error_that_is_no_disk_s_is_raised_as_it_is():
    with pytest.raises(KeyError, match="a bug"), Writer() as writer:
        writer.start(refuse(KeyError("a bug")))


def test_the_error_that_came_first_ends_the_run():
    with pytest.raises(Diverged, match="first"), Writer() as writer:
        writer.start(refuse(OSError("full")))
        raise Diverged("first")


def test_everything_is_synced_before_it_is_marked_and_named(tmp_path, monkeypatch):
    seen, sync = [], checkpoint._sync

    def watched(path):
        marked = [folder for folder in (tmp_path / "ckpt").glob("*") if (folder / "COMPLETE").exists()]
        seen.append((path.name, [folder.name for folder in marked]))
        sync(path)

    monkeypatch.setattr(checkpoint, "_sync", watched)
    checkpoint.save(tmp_path, 4, parts(), {}, keep=1)
    files = {f"{part}.safetensors" for part in checkpoint.PARTS} | {"meta.json", "checksums.json"}
    hidden = f".{STEP}.unfinished"
    assert {name for name, marked in seen if not marked} == files
    assert seen[6:] == [
        ("COMPLETE", [hidden]),
        (hidden, [hidden]),
        ("ckpt", [STEP]),
        (".latest.unfinished.txt", [STEP]),
    ]


def test_what_a_killed_save_left_is_no_obstacle(tmp_path):
    checkpoint.save(tmp_path, 4, parts(), {"try": 1}, keep=1)
    root = tmp_path / "ckpt"
    for name in (f".{STEP}.unfinished", f"{STEP}.aside", ".step_00000002.unfinished"):
        (root / name).mkdir()
        (root / name / "student.safetensors").write_text("half")
    checkpoint.save(tmp_path, 4, parts(), {"try": 2}, keep=1)
    assert sorted(path.name for path in root.iterdir()) == ["latest", STEP]
    assert checkpoint.load(root / STEP)[1]["try"] == 2


def test_what_a_killed_deletion_left_is_no_obstacle(tmp_path):
    for step in (4, 8):
        checkpoint.save(tmp_path, step, parts(), {}, keep=2)
    going = tmp_path / "ckpt" / ".step_00000008.unfinished"
    going.mkdir()
    (going / "student.safetensors").write_text("half")
    checkpoint.drop_after(tmp_path, 4)
    assert sorted(path.name for path in (tmp_path / "ckpt").iterdir()) == ["latest", STEP]


def test_folders_of_other_names_are_no_checkpoints(tmp_path):
    folder = checkpoint.save(tmp_path, 4, parts(), {}, keep=1)
    folder.rename(folder.with_name("step_00000004.kept"))
    assert checkpoint.latest(tmp_path) is None


def test_the_newest_until_a_step_may_be_of_that_step(tmp_path):
    for step in (4, 8):
        checkpoint.save(tmp_path, step, parts(), {}, keep=2)
    found = [checkpoint.latest(tmp_path, until=until) for until in (3, 4, 7, 8)]
    assert [folder and folder.name for folder in found] == [None, STEP, STEP, "step_00000008"]


@pytest.mark.parametrize(
    ("text", "words"), [("{", "cannot be read"), ("{}", "checksums lack meta.json"), (None, "lack teacher.safetensors")]
)
def test_checksums_that_vouch_for_too_little_are_refused(text, words, tmp_path):
    folder = checkpoint.save(tmp_path, 4, parts(), {}, keep=1)
    sums = json.loads((folder / "checksums.json").read_text())
    del sums["teacher.safetensors"]
    (folder / "checksums.json").write_text(json.dumps(sums) if text is None else text)
    with pytest.raises(ValueError, match=f"no usable checkpoint: .*{words}"):
        checkpoint.load(folder)


@pytest.mark.parametrize("change", ["more", "less", "shape"])
def test_tensors_that_do_not_fit_are_named(change):
    given = checkpoint.snapshot(parts())
    if change == "more":
        given["student"]["fill.other"] = torch.zeros(1)
    elif change == "less":
        del given["student"]["fill"]
    else:
        given["student"]["fill"] = torch.zeros(1)  # copy_ would spread it
    with pytest.raises(ValueError, match="student does not fit: 1 tensors differ, first 'fill"):
        checkpoint.restore(task.build(), given)


def job(folder, writer: Writer) -> SimpleNamespace:
    """What ``saving.roll_back`` has of a job with one rank."""
    here = SimpleNamespace(first=True, share=lambda words: words)
    return SimpleNamespace(writer=writer, here=here, folder=folder, log=SimpleNamespace(say=lambda _: None))


def test_a_rollback_waits_for_the_checkpoint_that_is_being_written(tmp_path):
    """It has seen the trouble, and would be the newest once it is there."""
    checkpoint.save(tmp_path, 4, parts(), {}, keep=2)
    asked = threading.Event()

    def late():
        asked.wait(0.5)
        return checkpoint.save(tmp_path, 8, parts(1), {}, keep=2)

    with Writer() as writer:
        writer.start(late)
        saving.roll_back(job(tmp_path, writer), Verdict("loss_spike", "rollback", "the loss is high", 5))
    assert checkpoint.latest(tmp_path).name == STEP


@pytest.mark.parametrize(("since", "kept"), [(4, True), (3, False)])
def test_a_rollback_keeps_the_checkpoint_of_the_step_before_the_trouble(since, kept, tmp_path):
    """A checkpoint after 4 steps has seen the steps 0 to 3."""
    checkpoint.save(tmp_path, 4, parts(), {}, keep=2)
    asked = job(tmp_path, Writer()), Verdict("loss_spike", "rollback", "the loss is high", since)
    if kept:
        saving.roll_back(*asked)
    else:
        with pytest.raises(Diverged, match="no checkpoint from before step 3"):
            saving.roll_back(*asked)
    assert (tmp_path / "ckpt" / STEP).exists() == kept
