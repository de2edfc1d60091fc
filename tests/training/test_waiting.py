"""What the data pipeline took of each step, and what it left out, in words."""

from types import SimpleNamespace

import pytest

from medfast.training.log import _waited
from medfast.training.waiting import Waiting


def test_the_wait_is_shared_out_by_what_workers_did():
    lines = []
    job = SimpleNamespace(damaged=set(), here=SimpleNamespace(first=True), log=SimpleNamespace(say=lines.append))
    spent = {"read": 1.0, "make": 5.0}
    stream = SimpleNamespace(waited=2.0, seconds=lambda: dict(spent), damaged={})
    waiting = Waiting(stream, job)
    stream.waited, spent["read"], spent["make"] = 3.0, 4.0, 6.0
    assert waiting.taken() == {"wait_s": 1.0, "wait": {"read": 0.75, "make": 0.25}} and not waiting.damaged
    stream.damaged = {"ab": "volume ab is not what was written"}
    assert waiting.taken() == {"wait_s": 0.0, "wait": {}} and waiting.taken()["wait_s"] == 0
    assert lines == ["left out, number 1: volume ab is not what was written"]
    assert waiting.damaged == 1 and job.damaged == {"ab"}
    assert Waiting(SimpleNamespace(waited=0.0), job).taken() == {"wait_s": 0.0, "wait": {}}


@pytest.mark.parametrize(
    ("time", "line"),
    [
        ({"step_s": 2.0, "wait_s": 0.5, "wait": {"plan": 1e-4, "read": 0.1, "make": 0.4}},
         "wait 25.0% (make 20.0, read 5.0)"),
        ({"step_s": 2.0, "wait_s": 0.5}, "wait 25.0%"),
    ],
)  # fmt: skip
def test_the_progress_line_names_the_stages(time, line):
    assert _waited(time) == line
