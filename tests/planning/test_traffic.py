"""Formulas of traffic, and that docs/scaling.md shows what they give."""

import sys
from pathlib import Path

import pytest

from medfast.planning.traffic import payloads, sent

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))


@pytest.mark.parametrize(
    ("stage", "micro", "found"),
    [(0, 3, {"all_reduce": 100}), (1, 3, {"all_reduce": 100, "all_gather": 100}),
     (2, 3, {"all_reduce": 300, "all_gather": 100}), (3, 3, {"all_gather": 600, "reduce_scatter": 300})],
)  # fmt: skip
def test_what_is_sent_by_stage(stage, micro, found):
    assert payloads(stage, 100, micro) == found


def test_a_sharded_teacher_and_recomputation_cost_more():
    assert payloads(0, 100, replica=30) == {"all_reduce": 100, "all_gather": 30}
    assert payloads(3, 100, checkpointed=True)["all_gather"] == 300


def test_bytes_on_the_wire():
    assert sent({"all_reduce": 80}, 4) == 120 and sent({"all_gather": 80}, 4) == 60 and sent({"all_reduce": 80}, 1) == 0
    with pytest.raises(ValueError, match="stages 0 to 3"):
        payloads(4, 1)


def test_the_page_shows_what_the_formulas_give():
    import scaling

    page = (ROOT / "docs" / "scaling.md").read_text()
    assert scaling.volumes() in page and scaling.times() in page, "python benchmarks/traffic.py --tables"
