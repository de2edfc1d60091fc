"""``medfast check``: does every objective learn, and do the papers' ablations point where they say, on phantoms?

Every run is what ``medfast pretrain CONFIG --tiny`` does, with the same loop, on phantoms whose organs are known. A
linear probe tells the organs of held-out phantoms from the tokens of the frozen encoder, before and after. Results go
to ``runs.jsonl``; runs that are there are not run again.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from medfast import config as configuration
from medfast.data.loader import open_stream
from medfast.data.phantom import write_phantoms
from medfast.data.prepare import prepare
from medfast.data.progress import Progress
from medfast.data.store import append, read_lines
from medfast.evaluation.learning import Direction, Row, ablations_table, learning_table
from medfast.evaluation.measures import measures
from medfast.evaluation.probe import CELL, RIDGE, collect, probe
from medfast.objectives import OBJECTIVES
from medfast.training import pretrain
from medfast.training.distributed import world
from medfast.types import Objective

__all__ = ["ABLATIONS", "DIRECTIONS", "LEARN", "Case", "ablations", "check", "learn"]

CONFIGS = Path(__file__).parents[1] / "configs"
SEEDS = (0, 1, 2)
MARKS = ("<!-- {} -->", "<!-- end -->")  # of a page, around a table
PHANTOMS, PHANTOM_SEED, SPACING = 24, 6, 2.0  # a third of them held out; mm
PROBE_SEED, PROBE_BATCH = 0x70726F62, 8
CROPS, VOXELS = 192, 24 * 64**3  # at most, that the probe is fitted to; half as many judge it
MEASURED = 8  # held-out samples for the measures of the ablations
# The optimisation of all runs: presets have rates for days on large batches.
BENCH = (
    "train.strategy=ddp", "train.precision=fp32", "train.batch=2", "train.validate_crops=0", "train.checkpoint_every=0",
    "train.keep_last=1", "optim.lr=1e-3", "optim.min_lr=0", "optim.warmup=0.1", "optim.weight_decay=[0.04, 0.04]",
    "optim.clip={kind: global, max: 1.0}", "optim.frozen=null", "data.workers=0", "data.holdout=0.34",
)  # fmt: skip
# Steps that take 15 to 25 s on a quiet core; three to five times as many for those that lay below random after so few.
STEPS = {
    "smart": 120, "dagman": 120, "smit": 120, "ibot": 30, "ibot_smart": 30, "rcr": 20, "swinfuse": 36, "simmim": 320,
    "attmask": 600, "mae": 600, "moco_v3": 600, "mst": 120, "sdda_mae": 1800,
    "simclr": 80, "byol": 80, "simprot": 80, "simprot_w": 80, "btrot": 240,
}  # fmt: skip


class Case(NamedTuple):
    """What is run: a preset as --tiny makes it, and what is changed in it."""

    preset: str
    overrides: tuple[str, ...] = ()


LEARN = {name: Case(name) for name in OBJECTIVES}
SMART_LOSSES = ("amip", "ampd", "aitd", "gitd")
ABLATIONS = {
    "smart": Case("smart"),
    "smart, clean teacher": Case("smart", ("objective.teacher_drop=0",)),
    **{f"smart, no {loss}": Case("smart", (f"objective.weights.{loss}=0",)) for loss in SMART_LOSSES},
    "simprot": Case("simprot"),
    "simprot, no restore": Case("simprot", ("objective.restore=false",)),
    "simprot_w": Case("simprot_w"),
}


DIRECTIONS = (
    Direction("a noisy teacher raises the entropy of attention heads", "head_entropy", "smart", "smart, clean teacher"),
    Direction("attention masks hide more foreground than random masks", "hidden_organs", "smart", 1.0),
    Direction("without restoring, SimPROT collapses by position", "same_position", "simprot, no restore", "simprot"),
    Direction("a weight above 1 lowers that similarity", "same_position", "simprot", "simprot_w"),
    *(Direction(f"no image prediction hurts more than no {loss.upper()}", "trained", f"smart, no {loss}",
                "smart, no amip") for loss in SMART_LOSSES[1:]),
)  # fmt: skip


def learn(
    out: Path, seeds: Sequence[int] = SEEDS, objectives: Sequence[str] | None = None, steps: int | None = None,
    page: Path | None = None,
) -> str:  # fmt: skip
    """The table of what each objective learns, in Markdown; also ``out/learn.md``, and between the marks of ``page``.

    steps: of every run, instead of ``STEPS``. ValueError for an objective that there is not, or a page
    without marks.
    """
    chosen = list(LEARN if objectives is None else objectives)
    if unknown := sorted(set(chosen) - set(LEARN)):
        raise ValueError(f"there is no objective called {', '.join(unknown)}; there are: {', '.join(LEARN)}")
    _check_page(page, "learn")
    rows = check({name: LEARN[name] for name in chosen}, seeds, out, steps)
    return _write("learn", learning_table(rows, {name: _about(LEARN[name]) for name in chosen}, seeds), out, page)


def ablations(out: Path, seeds: Sequence[int] = SEEDS, steps: int | None = None, page: Path | None = None) -> str:
    """The table of the papers' claims, in Markdown; also ``out/ablations.md``. The rest is as in ``learn``."""
    _check_page(page, "ablations")
    return _write("ablations", ablations_table(check(ABLATIONS, seeds, out, steps), DIRECTIONS, seeds), out, page)


def _check_page(page: Path | None, what: str) -> None:
    """ValueError, before hours of runs, where a table has no place in a page."""
    if page is not None and MARKS[0].format(what) not in page.read_text():
        raise ValueError(f"{page} has no line {MARKS[0].format(what)!r} after which the table could stand")


def _write(what: str, table: str, out: Path, page: Path | None) -> str:
    (out / f"{what}.md").write_text(table + "\n")
    if page is not None:
        start, end = MARKS[0].format(what), MARKS[1]
        before, after = page.read_text().split(start, 1)
        page.write_text(f"{before}{start}\n{table}\n{end}{after.split(end, 1)[1]}")
    return table


def _about(case: Case) -> str:
    """The backbone, and what stands in for what the paper trains on."""
    config = configuration.load(CONFIGS / f"{case.preset}.yaml", tiny=True)["objective"]
    stands_in = configuration.STAND_INS.get(config["name"])
    return f"{config['backbone']['name']}" + (f"; {stands_in}" if stands_in else "")


def check(cases: Mapping[str, Case], seeds: Sequence[int], out: Path, steps: int | None = None) -> list[Row]:
    """Rows of all these runs, as ``evaluation.learning`` takes them; those that ``out/runs.jsonl`` lacks are made."""
    out.mkdir(parents=True, exist_ok=True)
    store = _store(out)
    wanted = [(name, case, seed) for seed in seeds for name, case in cases.items()]
    configs = {(name, seed): _config(case, seed, store, steps) for name, case, seed in wanted}
    known = {(row["case"], row["seed"], row["settings"]): row for row in read_lines(out / "runs.jsonl", "settings")}
    rows = []
    with world(), Progress(len(wanted), noun="runs") as shown:
        for name, _, seed in wanted:
            config = configs[name, seed]
            mark = _mark(config)
            if (name, seed, mark) not in known:
                config["out"] = str(out / "runs" / f"{name.replace(', ', '_').replace(' ', '_')}-{seed}-{mark}")
                row = {"case": name, "seed": seed, "settings": mark, **run(config)}
                append(out / "runs.jsonl", row)
                known[name, seed, mark] = row
            row = known[name, seed, mark]
            rows.append(row)
            shown.step(f"{name}, {seed=}: probe {row['random']:.3f} -> {row['trained']:.3f}, {row['seconds']:.0f} s")
    return rows


def _store(out: Path) -> Path:
    """The phantoms, written and prepared once."""
    if not (out / "phantoms" / "phantoms.csv").exists():  # which is written last
        write_phantoms(out / "phantoms", PHANTOMS, PHANTOM_SEED, spacing=SPACING, labels=True)
    prepare(out / "phantoms" / "phantoms.csv", out / "store", spacing=SPACING, progress=False)
    return out / "store"


def _config(case: Case, seed: int, store: Path, steps: int | None) -> dict[str, Any]:
    overrides = (*BENCH, f"train.seed={seed}", f"data.store={store}", *case.overrides)
    steps = STEPS[case.preset] if steps is None else steps
    return configuration.load(CONFIGS / f"{case.preset}.yaml", *overrides, tiny=True, steps=steps)


def _mark(config: Mapping[str, Any]) -> str:
    """Twelve digits that tell settings apart; where the store lies is none."""
    data = {key: value for key, value in config["data"].items() if key != "store"}
    bench = (PHANTOMS, PHANTOM_SEED, SPACING, CROPS, VOXELS, MEASURED, CELL, RIDGE)
    train = [config["train"][key] for key in ("seed", "steps", "batch", "precision")]
    text = json.dumps([config["objective"], data, config["optim"], train, bench])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def run(config: dict[str, Any]) -> dict[str, Any]:
    """Train one configuration: what a row says of it."""
    objective, train = configuration.build(config), configuration.train_settings(config)
    before = _probed(objective, config)
    streams = [
        open_stream(config["data"], seed=train.seed, batch=train.batch, views=objective.views, split=split,
                    ahead=objective.ahead)
        for split in ("train", "holdout")
    ]  # fmt: skip
    begin, used = time.perf_counter(), time.process_time()
    with contextlib.redirect_stderr(io.StringIO()):  # the run's own train.log has it
        pretrain(objective, config, *streams)
    seconds, used = time.perf_counter() - begin, time.process_time() - used
    held_out = open_stream({**config["data"], "intensity": None}, seed=PROBE_SEED, batch=PROBE_BATCH,
                           views=objective.views, split="holdout", ahead=objective.ahead)  # fmt: skip
    return {
        "steps": train.steps, "seconds": round(seconds, 2), "cpu_seconds": round(used, 2),
        "threads": torch.get_num_threads(), "random": before, "trained": _probed(objective, config),
        "measures": measures(objective, held_out, MEASURED),
    }  # fmt: skip


def _probed(objective: Objective, config: Mapping[str, Any]) -> float:
    """Balanced accuracy of the probe on plain crops of the size and window that are trained on."""
    data = {key: config["data"][key] for key in ("store", "size", "window", "holdout", "workers")}
    open_plain = partial(open_stream, data, seed=PROBE_SEED, batch=PROBE_BATCH, views=1)
    count = min(VOXELS // _voxels(data["size"]), CROPS)
    return probe(collect(objective, open_plain(split="train"), count),
                 collect(objective, open_plain(split="holdout"), count // 2))  # fmt: skip


def _voxels(size: int | Iterable[int]) -> int:
    return int(torch.tensor([size] * 3 if isinstance(size, int) else list(size)).prod())
