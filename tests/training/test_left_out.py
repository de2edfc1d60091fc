"""Volumes left out: the same on all ranks, in every row, in the checkpoint, and judged again by a run that goes on."""

import json
import shutil
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_task as task

from medfast.data.loader import open_stream
from medfast.data.store import DataError
from medfast.training import checkpoint, pretrain
from medfast.training.left_out import LeftOut

sys.path.append(str(Path(__file__).parents[1] / "data"))
from stores import write_store

SHAPES = [(8, 8, 8)] * 6


class Ranks:
    """Threads in the place of ranks: ``share`` as of ``World``."""

    def __init__(self, size):
        self.size, self._said, self._met = size, {}, threading.Barrier(size, timeout=20)

    def job(self, own, lines):
        def share(text, rank):
            self._met.wait()
            if own == rank:
                self._said[rank] = text
            self._met.wait()
            return self._said[rank]

        here = SimpleNamespace(size=self.size, share=share)
        return SimpleNamespace(damaged=set(), here=here, log=SimpleNamespace(say=lines.append))


def store_of(folder, *bad):
    write_store(folder, SHAPES)
    for name in bad:
        spoil(folder, name)
    return folder


def spoil(folder, name):
    file = folder / "volumes" / f"{name}.npy"
    data = bytearray(file.read_bytes())
    data[-3] ^= 4
    file.write_bytes(data)


def opened(folder, split="train", **data):
    section = {"store": str(folder), "size": 4, "window": [-21000, 29000], "workers": 1, "holdout": 0.3, **data}
    return open_stream(section, seed=0, batch=4, views=2, split=split)


def united(folder, skip):
    """What two ranks, each of which met another damaged volume, know after they met: (jobs, streams, errors, lines)."""
    ranks, lines, errors = Ranks(2), ([], []), {}
    streams = [opened(folder, skip=skip) for _ in range(2)]
    jobs = [ranks.job(rank, lines[rank]) for rank in range(2)]
    for stream, volume in zip(streams, ("v01", "v02"), strict=True):
        stream.judge([volume])

    def rank(number):
        found = LeftOut(jobs[number], streams[number])
        assert found.news
        try:
            found.unite()
        except DataError as error:
            errors[number] = str(error)
        assert errors or not found.news

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return jobs, streams, errors, lines


def test_ranks_leave_out_what_any_of_them_met(tmp_path):
    jobs, streams, errors, lines = united(store_of(tmp_path / "s", "v01", "v02"), skip=2)
    assert not errors and jobs[0].damaged == jobs[1].damaged == {"v01", "v02"}
    assert all(sorted(stream.damaged) == ["v01", "v02"] for stream in streams)
    assert lines[0] == lines[1] and lines[0][1].startswith("left out, number 2: volume v02 is not what was written")


def test_the_budget_is_that_of_all_ranks(tmp_path):
    _, _, errors, _ = united(store_of(tmp_path / "s", "v01", "v02"), skip=1)
    assert sorted(errors) == [0, 1]
    assert all("1 damaged volumes may be left out (data.skip)" in said for said in errors.values())


class Cropped(task.Tiny):
    """``Tiny`` on the first cells of real crops."""

    def forward(self, batch, t):
        views = tuple(view.flatten(1)[:, : 8 * task.WIDTH].reshape(-1, 1, 8, task.WIDTH, 1) for view in batch.views)
        return super().forward(SimpleNamespace(views=views, key=batch.key, targets={}), t)


def trained(out, folder, **data):
    streams = opened(folder, **data), opened(folder, "holdout", **data)
    pretrain(Cropped(), task.config(out, train__validate_crops=0, train__validate_every=0), *streams)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row.get("damaged") for row in rows], (out / "train.log").read_text()


def half_way(out):
    shutil.rmtree(out / "ckpt" / "step_00000008")


def test_a_run_counts_what_it_left_out_and_one_that_goes_on_judges_it_again(tmp_path):
    folder, out = store_of(tmp_path / "s", "v01"), tmp_path / "run"
    counts, log = trained(out, folder, skip=1)
    assert counts[3:] == [1] * 5 and set(counts) <= {None, 1}
    assert log.count("left out, number 1: volume v01") == 1
    assert "1 volume(s), v01, left out as damaged (data.skip)" in log
    assert checkpoint.load(checkpoint.latest(out))[1]["damaged"] == ["v01"]
    half_way(out)
    with pytest.raises(DataError, match="v01"):
        trained(out, folder, skip=0)
    assert trained(out, folder, skip=1)[0][4:] == [1] * 4, "counted from the first step on"
    half_way(out)
    spoil(folder, "v01")  # the same bit once more: as it was written
    counts, log = trained(out, folder, skip=1)
    assert counts[4:] == [None] * 4 and "v01, had been left out and can be read now: used again" in log
    assert checkpoint.load(checkpoint.latest(out))[1]["damaged"] == []
