"""What a run leaves behind: readable by TensorBoard, and silent about where it ran."""

import socket

import pytest
import tiny_task as task


def test_no_host_name_anywhere_in_the_run_folder(tmp_path, monkeypatch):
    names = {socket.gethostname(), "planted-host"}
    monkeypatch.setattr(socket, "gethostname", lambda: "planted-host")
    task.run(tmp_path)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.parent.name == "tb" for path in files)
    for path in files:
        assert not [name for name in names if name in str(path.relative_to(tmp_path))], path
        assert not [name for name in names if name.encode() in path.read_bytes()], path


def test_tensorboard_reads_every_step_once(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with pytest.raises(SystemExit):
        task.run(tmp_path, stop_at=2)
    (tmp_path / "ckpt" / "step_00000004").rename(tmp_path / "lost")  # the run begins again, over what the board shows
    task.run(tmp_path)
    board = reader.EventAccumulator(str(tmp_path / "tb"))
    board.Reload()
    rows = task.rows(tmp_path)
    assert [event.step for event in board.Scalars("total")] == list(range(8))
    for tag, found in (
        ("total", [row["total"] for row in rows]),
        ("loss/recon", [row["loss"]["recon"] for row in rows]),
    ):
        assert [event.value for event in board.Scalars(tag)] == pytest.approx(found, rel=1e-6)
