"""``medfast check`` without its runs: what would run is valid, what is there is not run again, tables are written."""

import json

import pytest

from medfast import check
from medfast.__main__ import main
from medfast.evaluation.learning import learning_table
from medfast.objectives import OBJECTIVES


@pytest.fixture
def quick(tmp_path, monkeypatch):
    """A folder whose runs are made up: they cost nothing and count themselves."""
    made = []

    def run(config):
        made.append(config)
        gain = 0.0 if config["objective"]["name"] == "byol" else 0.1 + 0.01 * config["train"]["seed"]
        return {
            "steps": config["train"]["steps"],
            "seconds": 1.0,
            "cpu_seconds": 1.0,
            "random": 0.4,
            "trained": 0.4 + gain,
            "measures": {},
        }

    monkeypatch.setattr(check, "run", run)
    monkeypatch.setattr(check, "_store", lambda out: out / "store")
    return tmp_path, made


def test_every_objective_and_every_claim_is_there():
    assert set(check.LEARN) == set(OBJECTIVES) >= set(check.STEPS)
    for direction in check.DIRECTIONS:
        assert {direction.more, direction.less} - {1.0} <= set(check.ABLATIONS)


@pytest.mark.parametrize("name", [*check.LEARN, *check.ABLATIONS])
def test_what_would_be_run_is_valid(name, tmp_path):
    config = check._config({**check.LEARN, **check.ABLATIONS}[name], 1, tmp_path, None)
    assert config["train"]["seed"] == 1 and config["train"]["strategy"] == "ddp" and config["optim"]["lr"] == 1e-3


def test_a_run_is_made_once_and_what_learns_nothing_is_named(quick, capsys):
    out, made = quick
    command = ["check", "learn", "--out", str(out), "--objectives", "mae", "byol"]
    assert main([*command, "--seeds", "0", "1"]) == 0 and len(made) == 4
    assert main([*command, "--seeds", "0", "1", "2"]) == 0 and len(made) == 6
    rows = [json.loads(line) for line in (out / "runs.jsonl").read_text().splitlines()]
    assert [(row["case"], row["seed"]) for row in rows] == [(n, s) for s in (0, 1, 2) for n in ("mae", "byol")]
    table = (out / "learn.md").read_text()
    assert table in capsys.readouterr().out
    lines = {name: next(line for line in table.splitlines() if f"`{name}`" in line) for name in ("mae", "byol")}
    assert lines["mae"].endswith("| **learns** |") and lines["byol"].endswith("| not above random |")


def test_other_settings_are_another_run(quick):
    out, made = quick
    check.learn(out, [0], ["mae"], steps=3)
    check.learn(out, [0], ["mae"], steps=4)
    assert [config["train"]["steps"] for config in made] == [3, 4] and made[0]["out"] != made[1]["out"]


def test_ablations_share_runs_with_the_table(quick):
    out, made = quick
    check.learn(out, [0], ["smart", "simprot", "simprot_w"])
    table = check.ablations(out, [0])
    assert len(made) == len(check.ABLATIONS) and (out / "ablations.md").read_text() == table + "\n"
    assert "no image prediction hurts" in table and "not run" in table  # the made-up runs measured nothing


def test_a_page_gets_the_table_between_its_marks(quick):
    out, made = quick
    page = out / "page.md"
    page.write_text("a\n<!-- ablations -->\nx\n<!-- end -->\nb\n<!-- learn -->\nold\n<!-- end -->\nc\n")
    for _ in range(2):
        table = check.learn(out, [0], ["mae"], page=page)
    text = page.read_text()
    assert text == f"a\n<!-- ablations -->\nx\n<!-- end -->\nb\n<!-- learn -->\n{table}\n<!-- end -->\nc\n"
    page.write_text("nothing")
    with pytest.raises(ValueError, match="no line '<!-- learn -->'"):
        check.learn(out, [5], ["mae"], page=page)
    assert len(made) == 1


def test_an_objective_that_there_is_not_is_refused(tmp_path, capsys):
    assert main(["check", "learn", "--out", str(tmp_path), "--objectives", "smurf"]) == 2
    assert "no objective called smurf" in capsys.readouterr().err


def test_what_is_not_trained_is_told_as_such(tmp_path, monkeypatch):
    """Real runs, of one step at a rate of 0, on few and coarse phantoms: the same probe before and after."""
    for name, value in (("PHANTOMS", 3), ("SPACING", 6.0), ("VOXELS", 2 * 64**3), ("MEASURED", 2)):
        monkeypatch.setattr(check, name, value)
    rows = check.check({"mae": check.Case("mae", ("optim.lr=0",))}, (0, 1), tmp_path, steps=1)
    assert all(0.0 < row["random"] == row["trained"] < 1.0 for row in rows) and rows[0]["random"] != rows[1]["random"]
    assert learning_table(rows, {"mae": "vit"}, (0, 1)).endswith("| +0.000 ± 0.000 | not above random |")
    (row,) = check.check({"mae": check.Case("mae")}, (0,), tmp_path, steps=2)
    assert row["trained"] != row["random"] and row["measures"]["mask_ratio"] == 0.75
    assert len(list((tmp_path / "runs").iterdir())) == 3
