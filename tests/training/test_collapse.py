"""Planted failures set the alarms off; healthy runs, from their first step on, do not."""

import math
from collections import Counter
from dataclasses import replace
from itertools import combinations_with_replacement

import pytest
import tiny_task
import torch
from collapse_runs import batch, mst, simprot, smart, train, volumes
from tiny_task import Memory

from medfast.__main__ import _exit_code
from medfast.objectives.gauges import equal_views, prototype_entropy
from medfast.training import Diverged, collapse, pretrain
from medfast.training.alarms import Alarms

SEEDS, EVERY = (0, 1, 2), 10
STEPS, RATE = {smart: 80, simprot: 100, mst: 60}, {smart: 1e-3, simprot: 3e-3, mst: 1e-3}
CROPS = {smart: 2, simprot: 2, mst: 8}  # for 16 rows at least: MST distils images, of which a crop has two
NAMES = ("collapse", "crop_collapse", "position_collapse", "equal_views", "idle_teacher")


def judged(rows, **most):
    """alarm -> the actions it asked for, in order, when it may ask for all."""
    alarms, found = Alarms({**dict.fromkeys(NAMES, "stop"), **most}), {}
    for row in rows:
        for verdict in alarms.judge(row):
            found.setdefault(verdict.alarm, []).append(verdict.action)
    return {name: actions for name, actions in found.items() if name in NAMES}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("build", [smart, simprot, mst])
def test_healthy_runs_are_quiet(build, seed):
    rows = train(build(seed), STEPS[build], EVERY, RATE[build], seed, crops=CROPS[build])
    assert judged(rows) == {}
    gauges = rows[-1]["gauge"]
    assert gauges.keys() > {"rank_student", "position_similarity", "variance_within", "head_entropy", "equal_views"}
    assert gauges["rows"] >= collapse.LEAST and gauges["variance_within"] > 0.5


@pytest.mark.parametrize("plant, alarm", [
    ("no centring", "collapse"), ("idle teacher", "idle_teacher"), ("equal views", "equal_views"),
])  # fmt: skip
def test_a_planted_failure_of_distillation_is_heard(plant, alarm):
    rows = train(smart(0), STEPS[smart], EVERY, RATE[smart], plant=plant)
    assert judged(rows)[alarm] == ["warn", "checkpoint", "stop"]


def test_one_token_per_crop_is_heard():
    rows = train(smart(0), 3 * EVERY, EVERY, RATE[smart], plant="one token")
    assert judged(rows) == {"crop_collapse": ["warn", "checkpoint", "stop"]}
    gauges = rows[-1]["gauge"]
    assert abs(gauges["information_within"]) < 1e-6 < gauges["information"]


def test_tokens_that_are_not_turned_back_collapse_by_position():
    rows = train(simprot(0, restore=False), STEPS[simprot], EVERY, RATE[simprot])
    assert judged(rows)["position_collapse"] == ["warn", "checkpoint", "stop"]


def row(step, momentum=0.9, **gauge):
    gauge = {"rows": 64, **gauge} if gauge else {}
    return {"step": step, "total": 1.0, "momentum": momentum, "gauge": gauge}


def test_trouble_must_last_and_is_told_from_its_first_reading():
    sick, well = {"rank_student": 1.001}, {"rank_student": 7.0}
    alarm = collapse.collapse()
    assert alarm(row(5, **well)) is None and alarm(row(6)) is None
    first = alarm(row(10, **sick))
    assert (first.alarm, first.action, first.since) == ("collapse", "warn", 10) and "1.001" in first.words
    assert alarm(row(11)) is None  # no reading, so neither sick nor well
    assert alarm(row(20, **sick)).action == "checkpoint"
    again = collapse.collapse()
    again.load(alarm.state())
    last = again(row(30, **sick))
    assert (last.action, last.since) == ("stop", 10) and again(row(40, **sick)) is None
    assert alarm({**row(30, **sick), "skipped": "not finite"}) is None
    assert alarm(row(31, **well)) is None and alarm(row(32, **sick)).action == "warn"


@pytest.mark.parametrize("gauges, words", [
    ([{"entropy_used": 0.2, "information": 0.1}], "one prototype"),
    ([{"entropy_used": 4.0, "information": 0.6}, {"entropy_used": 4.1, "information": 0.01}], "told 0.6 before"),
    ([{"rank_teacher": 1.0, "rank_student": 9.0}], "teacher's tokens"),
])  # fmt: skip
def test_each_way_to_collapse_has_its_sentence(gauges, words):
    alarm = collapse.collapse()
    *before, last = [alarm(row(i, **gauge)) for i, gauge in enumerate(gauges)]
    assert before in ([], [None]) and words in last.words


def test_prototypes_that_never_told_anything_are_no_collapse():
    alarm = collapse.collapse()
    assert [alarm(row(i, entropy_used=4.0, information=x)) for i, x in enumerate((0.001, 0.002, 0.0005))] == [None] * 3


@pytest.mark.parametrize("gauges, words", [
    ({"variance_within": 0.01, "information": 1.0, "information_within": 0.5}, "1.00% of the variance"),
    ({"variance_within": 0.6, "information": 1.0, "information_within": 0.01}, "1 nats, of which 0.01 within"),
    ({"variance_within": 0.6, "information": 1.0, "information_within": 0.03}, None),
    ({"variance_within": 0.03}, None), ({"information": 1.0}, None),
])  # fmt: skip
def test_crops_that_are_one_have_their_sentences(gauges, words):
    said = collapse.crop_collapse()(row(0, **gauges))
    assert said is None if words is None else words in said.words


def test_too_few_rows_are_no_evidence():
    sick = {"rank_student": 1.0, "entropy_used": 0.0, "information": 0.0}
    few, enough = (collapse.collapse()(row(0, **sick, rows=n)) for n in (collapse.LEAST - 1, collapse.LEAST))
    assert few is None and enough.action == "warn"


def test_as_many_rows_as_are_asked_for_are_seldom_alike():
    """Of four prototypes, each as likely: how often crops, of which each has one, read as one prototype for all."""

    def chance(crops):
        found = 0.0
        for drawn in combinations_with_replacement(range(4), crops):
            used, _ = prototype_entropy(torch.eye(4)[list(drawn)])
            ways = math.factorial(crops) / math.prod(map(math.factorial, Counter(drawn).values()))
            found += ways / 4**crops * (used.item() < collapse.USED)
        return found

    assert chance(2) == 0.25
    assert chance(collapse.LEAST // 2) == pytest.approx(1 / 655, rel=0.01)  # two views: half as many crops as rows


def test_a_teacher_that_hardly_may_move_is_not_idle():
    alarm = collapse.idle_teacher()
    assert [alarm(row(i, 1.0 - 1e-6, teacher_norm=2.0)) for i in range(3)] == [None] * 3
    assert alarm(row(4, None, teacher_norm=2.0)) is None
    assert alarm(row(5, 0.996, teacher_norm=2.0)).action == "warn"


def test_most_limits_what_an_alarm_may_ask_for():
    rows = [row(i, rank_student=1.0) for i in range(3)]
    assert judged(rows, collapse="checkpoint")["collapse"] == ["warn", "checkpoint", "checkpoint"]
    assert judged(rows, collapse="none") == {}


def test_equal_views_are_counted_by_sample():
    given = batch(volumes(8, 1), 0, turned=False)
    assert equal_views(given)["equal_views"] == 0.0
    given.views[1][:2] = given.views[0][:2]
    assert equal_views(given)["equal_views"].item() == pytest.approx(2 / 6)


class Equal(Memory):
    """The second view is the first."""

    def batch(self, step, slots):
        made = super().batch(step, slots)
        return replace(made, views=(made.views[0],) * 2)


def test_an_alarm_that_may_stop_ends_the_run_with_exit_code_4(tmp_path):
    most = {
        "train__alarms": {"equal_views": "stop"},
        "train__steps": 40,
        "train__validate_crops": 0,
        "train__checkpoint_every": 0,
    }
    with pytest.raises(Diverged, match="step 29, reading 30 on end since step 0: the views of 100%") as stopped:
        pretrain(tiny_task.build(), tiny_task.config(tmp_path, **most), Equal(), Memory(split=1))
    assert _exit_code(stopped.value) == 4
    assert len(tiny_task.rows(tmp_path)) == 30
    said = (tmp_path / "train.log").read_text()
    assert "alarm equal_views (warn): step 2" in said and "alarm equal_views (checkpoint): step 9" in said
    assert (tmp_path / "ckpt" / "step_00000010").is_dir()
