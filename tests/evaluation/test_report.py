import base64
import copy
import html
import json
import re
import sys

import pytest
import torch

from medfast.evaluation import report, sections
from medfast.evaluation.gauges import Gauge
from medfast.evaluation.report import public
from medfast.evaluation.runlog import read_metrics, series
from medfast.training import Train
from medfast.training.distributed import World
from medfast.training.validate import validate
from medfast.types import Objective

SECRET = "smith_john_ct"


def write_run(run, rows):
    run.mkdir()
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 99, "lo')
    (run / "env.json").write_text(
        json.dumps({"cores": 2, "host": SECRET, "versions": {"torch": "9.9.9", "at": f"/x/{SECRET}"}})
    )
    return run


def row(step, **more):
    return {
        "step": step, "loss": {"amip": 0.5 - 0.01 * step, "gitd": 0.7}, "total": 1.2 - 0.01 * step, "lr": 1e-3,
        "momentum": 0.996, "grad_norm": 1.0, "gauge": {"rank_student": 2.0}, "time": {"step_s": 0.5}, **more,
    }  # fmt: skip


@pytest.fixture(scope="module")
def config():
    return {
        "objective": {"name": "smart", "prototypes": 64},
        "data": {"store": f"/data/{SECRET}", "window": [-500, 500], "size": 32},
        "init": {"from": f"runs\\{SECRET}"},
        "train": {"note": f"~/{SECRET}/x", "steps": 3},
        "out": SECRET,
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory, stream, fills, config):
    rows = [row(0), row(1, validation={"amip": 0.4, "total": 1.0}), row(2)]
    path = report(write_run(tmp_path_factory.mktemp("runs") / SECRET, rows), fills(), stream, config)
    return path, html.unescape(path.read_text())


def test_the_page_stands_alone(made):
    path, text = made
    assert path.name == "index.html" and path.parent.name == "report"
    assert not re.search(r"https?:|<script|<link|@import|file:", text)
    sources = re.findall(r'(?:src|href|data|poster)="([^"]*)"', text)
    assert sources and all(source.startswith("data:image/png;base64,") for source in sources)
    assert all(base64.b64decode(source.partition(",")[2]).startswith(b"\x89PNG") for source in sources)
    assert len(text) < 4e6


def test_the_page_names_no_place_and_no_source(made):
    path, text = made
    pictures = b"".join(base64.b64decode(part) for part in re.findall(r"base64,([^\"]*)", text))
    assert b"http" not in pictures
    assert SECRET not in text and SECRET.encode() not in pictures
    assert SECRET not in (path.parent / "reconstruction.json").read_text()


def test_the_page_shows_what_a_reader_asks_for(made):
    _, text = made
    for term in ("amip", "gitd", "rank_student", "entropy_used", "Learning rate", "Gradient norm", "Teacher momentum",
                 "Nearest visible voxel", "Median of the crop", "Gaussian mean", "collapsed", "random", "9.9.9",
                 "axial", "coronal", "sagittal", "Student's mask", "Teacher's attention", "Truth", "Error",
                 "prototypes: 64", "volume v0", "volume v1"):  # fmt: skip
        assert term in text, term
    assert text.count("What to look for") == text.count("<h2>")
    assert "3</b><span>optimizer steps" in text
    assert text.count('class="dots"') == 2


def test_a_single_volume_is_not_called_held_out(tmp_path, stream, fills, config, made):
    alone = copy.copy(stream)
    alone.note = "the store has one volume"
    text = report(write_run(tmp_path / "run", [row(0)]), fills(), alone, config).read_text()
    assert "volumes it was not trained on" in made[1] and "volumes it was not trained on" not in text
    assert "the volume it was trained on" in text and "the store has one volume" in text
    assert "trained on + held out" in made[1] and "trained on + held out" not in text


def test_references_are_drawn_only_where_they_were_measured():
    measured = {"entropy_used": Gauge(1.0, 0.0, 2.0, 3.0)}
    rows = [row(0, gauge={"entropy_used": 1.5}), row(1, gauge={"entropy_aitd": 1.5})]
    used, other = sections.collapse(rows, measured).split("<strong>entropy_aitd")
    assert used.count('class="level random"') == used.count('class="level bad"') == 1
    assert 'class="level' not in other


def test_references_are_measured_on_the_crops_masks_and_time_of_the_logged_gauges(tmp_path, stream, fills):
    class Clocked(fills):
        def tokens(self, batch, t=0.0):
            hidden = torch.stack(batch.targets.get("mask", (torch.zeros(1, 64),))).float().flatten(2)
            place = float((hidden * torch.arange(64)).mean()) / 10
            return {**super().tokens(batch, t), "student": torch.tensor([1, 1 + t, place, len(batch.views[0])]).diag()}

    objective, train = Clocked(), Train(steps=4, validate_crops=3)
    _, logged = validate(objective, stream, train, 2 / 4, World(0, 1, torch.device("cpu")))
    assert logged.pop("rows") == 2 * 3  # images: two views of each crop
    seen = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sections, "collapse", lambda rows, measured: seen.update(measured) or "")
        run = write_run(tmp_path / "run", [row(0), row(2)])
        report(run, objective, stream, {"train": {"steps": 4, "validate_crops": 3}})
    assert {name: gauge.value for name, gauge in seen.items()} == pytest.approx(logged)


def test_distillation_terms_show_where_they_say_nothing():
    rows = [row(0), row(1)]
    amip, gitd = sections.losses(rows, {"gitd": 0.1 * 6.24}).split("<strong>gitd")
    assert "says nothing yet" in gitd and gitd.count('class="level') == 1 and "ln K" in gitd
    assert 'class="level' not in amip
    assert 'class="level' not in sections.losses(rows, {})


def test_the_numbers_of_the_comparison_are_kept(made):
    path, text = made
    fixed, own = json.loads((path.parent / "reconstruction.json").read_text())
    assert fixed["mask"] == "fixed" and own["mask"] == "own"
    assert fixed["l1"]["model"] == pytest.approx(0.3, abs=1e-5) and not fixed["passes"]
    assert f"{fixed['l1']['model']:.4f}" in text and f"{fixed['l1']['nearest']:.4f}" in text


@pytest.fixture(autouse=True, scope="module")
def quick():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["medfast.evaluation.report"], "CROPS", 4)
        patch.setattr(sys.modules["medfast.evaluation.gallery"], "CANDIDATES", 4)
        yield


@pytest.mark.parametrize(
    "rows", [[{"step": 0}], [{"step": 5, "loss": {}, "total": None}, {"step": 6, "momentum": None}]]
)
def test_a_bare_run_still_has_a_page(tmp_path, stream, fills, rows):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert "optimizer steps" in report(run, fills(), stream, {"train": {"steps": 10}}).read_text()


def test_an_objective_that_draws_nothing_still_has_a_page(tmp_path, stream, config):
    class Plain(Objective):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(3))

    run = write_run(tmp_path / "run", [row(0)])
    text = report(run, Plain(), stream, config).read_text()
    assert "amip" in text and "Nearest visible voxel" not in text
    assert not (run / "report" / "reconstruction.json").exists()


def test_nothing_to_report_is_said(tmp_path, stream, fills):
    with pytest.raises(ValueError, match=r"no metrics\.jsonl"):
        report(tmp_path, fills(), stream, {})
    (tmp_path / "metrics.jsonl").write_text('{"step"')
    with pytest.raises(ValueError, match="no complete row"):
        report(tmp_path, fills(), stream, {})


def test_a_step_done_twice_counts_once_and_last(tmp_path):
    run = write_run(tmp_path / "run", [row(0), row(1, total=9.0), row(1, total=2.0)])
    assert series(read_metrics(run), "total") == ([0, 1], [1.2, 2.0])


def test_settings_lose_only_places(config):
    kept = public(config)
    assert kept == {
        "objective": {"name": "smart", "prototypes": 64}, "data": {"window": [-500, 500], "size": 32}, "init": {},
        "train": {"steps": 3},
    }  # fmt: skip
