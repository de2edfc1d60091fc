"""What the data pipeline took of each step, in words."""

from types import SimpleNamespace

import pytest

from medfast.training.log import _waited
from medfast.training.waiting import Waiting


def test_the_wait_is_shared_out_by_what_workers_did():
    spent = {"read": 1.0, "make": 5.0}
    stream = SimpleNamespace(waited=2.0, seconds=lambda: dict(spent))
    waiting = Waiting(stream)
    stream.waited, spent["read"], spent["make"] = 3.0, 4.0, 6.0
    assert waiting.taken() == {"wait_s": 1.0, "wait": {"read": 0.75, "make": 0.25}}
    assert waiting.taken() == {"wait_s": 0.0, "wait": {}} and waiting.taken()["wait_s"] == 0
    assert Waiting(SimpleNamespace(waited=0.0)).taken() == {"wait_s": 0.0, "wait": {}}


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
