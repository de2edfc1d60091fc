"""Planted failures set the alarms off; healthy runs, from their first step on, do not."""

from dataclasses import replace

import pytest
import tiny_task
from collapse_runs import batch, simprot, smart, train, volumes
from tiny_task import Memory

from medfast.__main__ import _exit_code
from medfast.objectives.gauges import equal_views
from medfast.training import Diverged, collapse, pretrain
from medfast.training.alarms import Alarms

SEEDS, EVERY = (0, 1, 2), 10
STEPS, RATE = {smart: 80, simprot: 100}, {smart: 1e-3, simprot: 3e-3}
NAMES = ("collapse", "position_collapse", "equal_views", "idle_teacher")


def judged(rows, **most):
    """alarm -> the actions it asked for, in order, when it may ask for all."""
    alarms, found = Alarms({**dict.fromkeys(NAMES, "stop"), **most}), {}
    for row in rows:
        for verdict in alarms.judge(row):
            found.setdefault(verdict.alarm, []).append(verdict.action)
    return {name: actions for name, actions in found.items() if name in NAMES}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("build", [smart, simprot])
def test_healthy_runs_are_quiet(build, seed):
    rows = train(build(seed), STEPS[build], EVERY, RATE[build], seed)
    assert judged(rows) == {}
    assert rows[-1]["gauge"].keys() > {"rank_student", "position_similarity", "head_entropy", "equal_views"}


@pytest.mark.parametrize("plant, alarm", [
    ("no centring", "collapse"), ("idle teacher", "idle_teacher"), ("equal views", "equal_views"),
])  # fmt: skip
def test_a_planted_failure_of_distillation_is_heard(plant, alarm):
    rows = train(smart(0), STEPS[smart], EVERY, RATE[smart], plant=plant)
    assert judged(rows)[alarm] == ["warn", "checkpoint", "stop"]


def test_tokens_that_are_not_turned_back_collapse_by_position():
    rows = train(simprot(0, restore=False), STEPS[simprot], EVERY, RATE[simprot])
    assert judged(rows)["position_collapse"] == ["warn", "checkpoint", "stop"]


def row(step, momentum=0.9, **gauge):
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
