"""CONTRIBUTING's worked example is true: one file, one line of the table, one YAML, and it trains."""

import ast
import importlib
import json
import re
from pathlib import Path

import pytest
import torch

from medfast import config, objectives
from medfast.training import pretrain
from medfast.types import Batch, Key

ROOT = Path(__file__).parents[2]
EXAMPLE = re.findall(r"```(python|yaml)\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)


class Views:
    """A stream of two random views of whatever slots are asked for."""

    note, volumes, waited, batch_size = None, ["v"], 0.0, 2

    def batch(self, step, slots):
        generator = torch.Generator().manual_seed(step)
        views = tuple(torch.rand(len(slots), 1, 32, 32, 32, generator=generator) for _ in range(2))
        return Batch(views, None, Key(0, step, torch.as_tensor(list(slots))))

    def run(self, schedule):
        return (self.batch(*item) for item in schedule)

    def close(self): ...


@pytest.fixture
def added(tmp_path, monkeypatch):
    """The example's file in the package, its line in the table; the path of its YAML."""
    (_, source), (_, line), (_, preset) = EXAMPLE
    (tmp_path / "vicreg.py").write_text(source)
    monkeypatch.setattr(objectives, "__path__", [*objectives.__path__, str(tmp_path)])
    module = importlib.import_module("medfast.objectives.vicreg")
    imported, entry = line.strip().split("\n")
    assert ast.parse(imported).body[0].module == module.__name__
    name, made = re.fullmatch(r'"(\w+)": (\w+),', entry.strip()).groups()
    monkeypatch.setitem(objectives.OBJECTIVES, name, getattr(module, made))
    (tmp_path / "vicreg.yaml").write_text(preset)
    yield tmp_path / "vicreg.yaml"
    monkeypatch.delitem(importlib.sys.modules, module.__name__)


def test_the_example_is_an_objective_that_trains(added, tmp_path):
    small = ["objective.backbone.depths=[1,1]", "objective.backbone.heads=[1,2]", "objective.backbone.embed=12"]
    run = [f"out={tmp_path / 'run'}", "train.strategy=ddp", "train.precision=fp32", "train.validate_crops=2"]
    loaded = config.load(added, *small, *run, tiny=True, steps=2)
    objective = config.build(loaded)
    before = {name: x.detach().clone() for name, x in objective.named_parameters()}
    pretrain(objective, loaded, Views(), Views())
    rows = [json.loads(row) for row in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [set(row["loss"]) for row in rows] == [{"invariance", "variance", "covariance"}] * 2
    assert {"rank_student", "head_entropy", "position_similarity"} <= set(rows[-1]["gauge"])
    still = [name for name, x in objective.named_parameters() if torch.equal(x, before[name])]
    assert still == []


def test_the_examples_terms_are_the_papers(added):
    """Eqs. 1 to 6 of arXiv 2105.04906, in fp64, group by group."""
    swin = {"name": "swin", "embed": 12, "depths": [1, 1], "heads": [1, 2], "drop_path": 0.0}
    objective = config.build({"objective": {"name": "vicreg", "backbone": swin, "group": 3, "width": 5}})
    objective.double()
    torch.manual_seed(0)
    views = tuple(torch.rand(6, 1, 32, 32, 32, dtype=torch.float64) for _ in range(2))
    found = objective(Batch(views, None, Key(0, 0, torch.arange(6))), torch.tensor(0.0)).losses
    expected = {"invariance": 0.0, "variance": 0.0, "covariance": 0.0}
    z = [objective.projector(objective.backbone(view).summary) for view in views]
    for rows in (slice(0, 3), slice(3, 6)):
        a, b = z[0][rows], z[1][rows]
        expected["invariance"] += 25 * sum(((x - y) ** 2).sum() for x, y in zip(a, b, strict=True)) / 3 / 2
        for x in (a, b):
            spread = x.var(dim=0, unbiased=True)
            expected["variance"] += 25 * sum(max(0.0, 1 - (v + 1e-4) ** 0.5) for v in spread) / 5 / 2
            c = torch.cov(x.T)
            expected["covariance"] += sum(c[i, j] ** 2 for i in range(5) for j in range(5) if i != j) / 5 / 2
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
