"""`medfast models`: every architecture has a line, counts are the papers', measured columns are the newest rows."""

import json

from medfast import models
from medfast.__main__ import main


def test_every_architecture_has_a_line_and_lines_are_distinct():
    listed = {(model.table, model.name) for model in models.MODELS}
    assert listed == {(kind, name) for kind, entries in models.TABLES.items() for name in entries}
    assert len({model.label for model in models.MODELS}) == len(models.MODELS)
    by_label = {model.label: model for model in models.MODELS}
    anchors = {"swin": 10_571_968, "swin_unetr": 62_186_708, "smit_unet, SMIT": 62_898_390, "resnet50": 46_155_072}
    assert {label: models.count(by_label[label]) for label in anchors} == anchors


def test_measured_columns_come_from_the_newest_rows(tmp_path, monkeypatch, capsys):
    kept = [model for model in models.MODELS if model.label in ("swin", "vit")]
    monkeypatch.setattr(models, "MODELS", kept)
    monkeypatch.setattr(models, "ROWS", tmp_path / "models.jsonl")
    assert main(["models"]) == 0
    assert "are not measured here: python benchmarks/models.py" in capsys.readouterr().out
    rows = [
        {"model": "swin", "size": 96, "gflop": g, "peak_gb": p, "device": "cpu", "commit": "abc"}
        for g, p in ((1, 9), (38.3, None))
    ]
    (tmp_path / "models.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[-7:] == ["10,571,968", "96-192-384-768", "4-8-16-32", "38", "-", "-", "-"]
    assert "88,568,064" in lines[2] and lines[-1].endswith("Measured on cpu, commit abc.")
