"""``medfast report RUN``: one HTML file about a run that needs nothing beside it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from medfast import __version__
from medfast.objectives.held_out import AT_ONCE, crops, with_masks
from medfast.types import Objective

from . import page, sections
from .gallery import gallery
from .gauges import Gauge, gauges_of, uniform_losses
from .reconstruction import GATE, Score, measure, summary
from .runlog import Row, read_environment, read_metrics, series

__all__ = ["public", "report"]

CROPS = 16  # held-out crops that are measured
_PRIVATE = {"store", "out", "from"}  # settings that name places
_KNOWN_FACTS = ("system", "machine", "cores", "threads", "ranks", "gpus", "cuda", "versions")  # of env.json


def report(run_dir: str | Path, objective: Objective, stream, config: Mapping[str, Any]) -> Path:
    """Measure ``objective`` on crops of the held-out ``stream`` and write the page about it.

    Prints the table of masked L1; returns the path of run_dir/report/index.html, reconstruction.json is beside it. The
    page holds no link, no path and no name of a source file. ValueError where the run has logged nothing.
    """
    run = Path(run_dir)
    rows, environment = read_metrics(run), read_environment(run)
    window = (config.get("data") or {}).get("window")
    scores = measure(objective, stream, CROPS)
    print(summary(scores))
    name = str((config.get("objective") or {}).get("name", type(objective).__name__))
    body = [_header(name, rows, objective, stream, scores)]
    if stream.note:
        body.append(f'<p class="look"><b>Mind.</b> {escape(stream.note)}</p>')
    if pictures := gallery(objective, stream):
        body.append(page.section("What it sees and what it fills in", _pictures_text(window), pictures))
    if scores:
        body.append(sections.comparison(scores, window))
    body.append(sections.losses(rows, uniform_losses(objective)))
    body.append(sections.collapse(rows, _gauges(objective, stream, config["train"], rows[-1]["step"])))
    body.append(sections.schedules(rows))
    body.append(_origin(objective, stream, environment, config))
    folder = run / "report"
    folder.mkdir(parents=True, exist_ok=True)
    if scores:
        _write(folder / "reconstruction.json", json.dumps([score.to_json() for score in scores], indent=1))
    _write(folder / "index.html", page.page(f"{name}: report of a run", body))
    return folder / "index.html"


def _gauges(objective: Objective, stream, train: Mapping[str, Any], step: int) -> dict[str, Gauge]:
    """Collapse gauges at ``step`` on the crops and masks on which training logs them: those of its validation."""
    count, device = train.get("validate_crops") or AT_ONCE, next(objective.parameters()).device
    batches = [with_masks(objective, batch).to(device) for batch in crops(stream, count, AT_ONCE)]
    return gauges_of(objective, batches, step / train["steps"])


def _write(file: Path, text: str) -> None:
    """Whole or not at all."""
    temporary = file.with_name(file.name + ".part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, file)


def _header(name: str, rows: Sequence[Row], objective: Objective, stream, scores: Sequence[Score]) -> str:
    total, held = len(stream.store), len(stream.volumes)
    entries = [(f"{rows[-1]['step'] + (rows[0]['step'] == 0):,}", "optimizer steps", "")]
    if stream.note:
        entries.append((f"{total}", "volume, trained on and measured on", "bad"))
    else:
        entries.append((f"{total - held:,} + {held:,}", "volumes trained on + held out", ""))
    entries.append((f"{sum(p.numel() for p in objective.parameters()) / 1e6:.2f} M", "trained parameters", ""))
    if seconds := _seconds(rows):
        entries.append((_duration(seconds), "time in training steps", ""))
    own = [score for score in scores if score.mask == "own"]
    for score in own:
        tone = "good" if score.median_ratio <= GATE else "bad"
        entries.append((f"{score.median_ratio:.0%}", "of the median predictor's error on hidden voxels of "
                        f"{'' if stream.note else 'held-out '}crops (goal: {GATE:.0%} or less)", tone))  # fmt: skip
        tone = "good" if score.interpolation_ratio < 1 else "bad"
        entries.append(
            (f"{score.interpolation_ratio:.0%}", "of the best interpolation's error (goal: below 100%)", tone)
        )
    verdict = "".join(_verdict(score) for score in own)
    verdict += "".join(_beside(score) for score in scores if score.mask == "fixed")
    where = "the volume it was trained on, as there is no other" if stream.note else "volumes it was not trained on"
    lead = (
        "A 3D transformer was shown crops of CT volumes with most of each crop hidden, and learned to fill in the rest "
        f"and to agree with a slowly moving copy of itself, its teacher. The objective is {escape(name.upper())}. "
        f"This page shows what came of it on {where}."
    )
    return f'<h1>What this run learned</h1><p class="lead">{lead}</p>{page.tiles(entries)}{verdict}'


def _verdict(score: Score) -> str:
    """In words, under the masks the objective sets: what it was trained for."""
    if score.passes:
        return (
            "<p><br>The reconstruction is learned: under the masks that the objective itself sets on these crops, it "
            "beats a constant by the margin set, and every interpolation from the visible voxels.</p>"
        )
    return (
        "<p><br>The reconstruction has <b>not</b> passed its test: it must reach the goals of the two tiles above. "
        "Short runs do not; train longer before you trust these features.</p>"
    )


def _beside(score: Score) -> str:
    """In words, under random masks, which leave something visible everywhere and so favour interpolation."""
    return (
        f"<p>Under random masks that hide {score.hidden:.0%} of each crop, which it was not trained on, it has "
        f"{score.median_ratio:.0%} of the median predictor's error and {score.interpolation_ratio:.0%} of the best "
        "interpolation's: there a visible neighbour is never far.</p>"
    )


def _seconds(rows: Sequence[Row]) -> float:
    """Time in steps; rows that were not logged count as the average of those that were."""
    steps, values = series(rows, "time", "step_s")
    return sum(values) / len(values) * (steps[-1] - steps[0] + 1) if values else 0.0


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _pictures_text(window: Sequence[float] | None) -> str:
    grey = f" Black is {window[0]:g} HU or less, white {window[1]:g} HU or more." if window else ""
    return (
        "First row of pictures: does the teacher's attention lie on organs and bones rather than on air, and does the "
        "student's mask follow it? Second row: does “filled in” continue outlines of body, bones and organs across "
        "cells, and is the error map dark except along edges? Fine texture cannot be guessed and stays blurred. "
        f"Letters: R, L patient's right and left; A, P front and back; S head.{grey} Crops and slices are "
        "chosen for what the scan shows, not for the result."
    )


def _origin(objective: Objective, stream, environment: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    facts = [("medfast", __version__), ("objective", type(objective).__name__)]
    if (backbone := getattr(objective, "backbone", None)) is not None:
        count = sum(p.numel() for p in backbone.parameters())
        facts.append(("backbone", f"{type(backbone).__name__}, {count:,} parameters"))
    facts.append(("held-out volumes", ", ".join(stream.volumes[:8]) + (" ..." if len(stream.volumes) > 8 else "")))
    for key in _KNOWN_FACTS:
        value = environment.get(key)
        if isinstance(value, Mapping):
            facts += [(str(k), str(v)) for k, v in value.items() if _is_plain(v) and k != "medfast"]
        elif isinstance(value, list) and value:
            facts.append((key, ", ".join(str(v) for v in value if _is_plain(v))))
        elif _is_plain(value):
            facts.append((key, str(value)))
    settings = escape(_outline(public(config)))
    look = "Everything that is needed to run this again; where files were is left out on purpose."
    return page.section("Where it came from", look, page.facts(facts),
                        f"<br><details><summary>All settings</summary><pre>{settings}</pre></details>")  # fmt: skip


def _is_plain(value: Any) -> bool:
    return isinstance(value, (int, float, str)) and not _names_place(value)


def _names_place(value: Any) -> bool:
    return isinstance(value, str) and ("/" in value or "\\" in value)


def public(value: Any) -> Any:
    """Settings without anything that names a place on a disk."""
    if isinstance(value, Mapping):
        return {k: public(v) for k, v in value.items() if k not in _PRIVATE and not _names_place(v)}
    if isinstance(value, (list, tuple)):
        return [public(v) for v in value if not _names_place(v)]
    return value


def _outline(value: Any, depth: int = 0) -> str:
    """Settings as indented lines."""
    lines = []
    for key, entry in value.items():
        if isinstance(entry, Mapping):
            lines.append(f"{'  ' * depth}{key}:\n{_outline(entry, depth + 1)}".rstrip("\n"))
        else:
            lines.append(f"{'  ' * depth}{key}: {json.dumps(entry, default=str)}")
    return "\n".join(lines) + "\n"
