"""Is a run the same run on other ranks, at another ZeRO stage? Saves on {1, 2, 4} ranks at stages 0 to 3, loads each
checkpoint on {1, 2, 3} ranks at every stage, and compares with the run that was not interrupted.

    python benchmarks/resume_matrix.py [--quick] [--out FILE.md]        # writes the table and FILE.jsonl

SMART itself, small, on phantoms; global batch 12 in micro-batches of at most 4, clipping per parameter, gloo. Student,
teacher, centres and moments must come back bit for bit, samples and masks of the steps that follow must be those of the
uninterrupted run, the losses of the next step within 1e-6 (relative, fp32) and the norm of its gradient within 1e-5,
and at the same number of ranks and stage everything to the end bit for bit. Exits with 1 where one is not. --quick: a
few pairs, for the tests.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import deepspeed
import torch
from forked import together
from rows import RESULTS, environment
from torch import Tensor

from medfast import config as configuration
from medfast.data.loader import Stream
from medfast.data.phantom import write_phantoms
from medfast.data.prepare import prepare
from medfast.objectives.smart import SMART
from medfast.training import checkpoint, pretrain, start
from medfast.training.deepspeed_engine import Engine
from medfast.training.distributed import World

STEPS, SAVED, BATCH, MICRO, NEAR = 6, 3, 12, 4, 1e-6
OBJECTIVE = {
    "name": "smart",
    "backbone": {"name": "swin", "embed": 12, "depths": [2, 2], "heads": [1, 2], "window": 4, "patch": 4,
                 "drop_path": 0.3, "semantic_attention": 2, "sa_heads": 4, "checkpoint": True},
    "mask": {"name": "attention", "ratio": 0.7, "hint": 0.1},
    "prototypes": 67, "head_widths": [31, 31, 13],  # odd numbers, which no number of ranks divides
}  # fmt: skip


class Place(NamedTuple):
    """Where a run is: so many ranks, this ZeRO stage."""

    ranks: int
    stage: int


class Witness(SMART):
    """Remembers what it was shown. seen: {"samples" | "masks": {step: {slot: digest}}}."""

    seen: dict[str, dict[str, dict[str, str]]]

    def _look(self, batch, drop_path):
        look = super()._look(batch, drop_path)
        if not self.training:  # held-out samples have slots of the same numbers
            return look
        slots = batch.key.sample.tolist()  # type: ignore[union-attr]  # the loader gives every batch its samples
        for kind, views in (("samples", batch.views), ("masks", look.mask.where.chunk(self.views))):
            found = self.seen[kind].setdefault(str(int(batch.key.step)), {})
            found |= {str(slot): _digest(view[i] for view in views) for i, slot in enumerate(slots)}
        return look


def _digest(tensors: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for x in tensors:
        digest.update(x.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def config(work: Path, out: Path, stage: int) -> dict[str, Any]:
    """Stages 2 and 3 cut the teacher too; nothing is small enough for stage 3 to be left whole."""
    return configuration.validate({
        "objective": OBJECTIVE,
        "data": {"store": str(work / "store"), "size": 32, "workers": 1, "holdout": 0.5},
        "optim": {"lr": 1e-3, "warmup": 0.2, "clip": {"kind": "per_parameter", "max": 0.3}},
        "train": {"strategy": "deepspeed", "steps": STEPS, "batch": BATCH, "micro": MICRO, "checkpoint_every": SAVED,
                  "validate_every": 0, "validate_crops": 1, "teacher": "sharded" if stage > 1 else "replicated"},
        "deepspeed": {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}},
        "out": str(out),
    })  # fmt: skip


def run(work: Path, out: Path, here: World, stage: int) -> None:
    """Pretrain in ``out`` to the end and write down what this rank was shown."""
    settings = config(work, out, stage)
    objective = configuration.build(settings)
    objective.__class__, Witness.seen = Witness, {"samples": {}, "masks": {}}
    streams = [Stream(**settings["data"], seed=0, batch=BATCH, split=split) for split in ("train", "holdout")]
    pretrain(objective, settings, *streams)
    (out / f"seen_{here.rank}.json").write_text(json.dumps(Witness.seen))


def reopened(work: Path, folder: Path, here: World, stage: int) -> dict[str, bool]:
    """Which parts of a checkpoint are bit for bit what a run that has loaded it holds; {} on ranks but the first."""
    settings = config(work, folder, stage)
    _, train, optim = start.resolve(settings)
    objective = configuration.build(settings)
    parts, _ = checkpoint.load(folder)
    checkpoint.restore(objective, parts)
    share, micro = train.shares(here.size)
    engine = Engine(objective, optim, train, here, share // micro, settings["deepspeed"])
    engine.load_moments(parts["optimizer"])
    held = {**checkpoint.describe(objective), **engine.contents()}
    return {part: _same(held[part], parts[part]) for part in parts} if here.first else {}


def _same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name].cpu(), b[name]) for name in b)


def name(*places: Place) -> str:
    return "_".join(f"{place.ranks}x{place.stage}" for place in places)


def judged(work: Path, saved: Place, loaded: Place) -> dict[str, Any]:
    """The row of a pair: what came back, and how far the next step's losses are from those of the saved run."""
    whole, parts = work / name(saved), work / name(saved, loaded)
    row: dict[str, Any] = {"saved": saved._asdict(), "loaded": loaded._asdict()}
    row |= json.loads((parts / "reopened.json").read_text())
    seen = [_seen(folder) for folder in (whole, parts)]
    for kind in ("samples", "masks"):
        row[kind] = all(seen[0][kind][step] == found for step, found in seen[1][kind].items())
    before, after = _metrics(whole), _metrics(parts)
    pairs = [(before[SAVED]["loss"][loss], value) for loss, value in after[SAVED]["loss"].items()]
    row["loss"] = max(abs(a - b) / abs(a) for a, b in pairs)
    row["norm"] = abs(after[SAVED]["grad_norm"] / before[SAVED]["grad_norm"] - 1)
    if saved == loaded:
        last = [checkpoint.load(folder / "ckpt" / f"step_{STEPS:08d}")[0] for folder in (whole, parts)]
        row["bits"] = {k: before[k] for k in after} == after and all(_same(last[0][p], last[1][p]) for p in last[0])
    odd = [value for value in row.values() if value is False]
    row["ok"] = row["loss"] <= NEAR and row["norm"] <= 10 * NEAR and not odd
    return row


def _seen(folder: Path) -> dict[str, dict[str, dict[str, str]]]:
    """What all ranks together were shown."""
    whole: dict[str, dict[str, dict[str, str]]] = {"samples": {}, "masks": {}}
    for path in folder.glob("seen_*.json"):
        for kind, steps in json.loads(path.read_text()).items():
            for step, found in steps.items():
                whole[kind].setdefault(step, {}).update(found)
    return whole


def _metrics(folder: Path) -> dict[int, dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: {key: value for key, value in row.items() if key != "time"} for row in rows}


def matrix(work: Path, pairs: list[tuple[Place, Place]]) -> list[dict[str, Any]]:
    """Save, load and judge every pair."""

    def data(here: World) -> None:
        write_phantoms(work / "nifti", 2)
        prepare(work / "nifti", work / "store", spacing=8.0, jobs=1, progress=False)

    def save(here: World) -> None:
        for place in sorted({saved for saved, _ in pairs if saved.ranks == here.size}):
            run(work, work / name(place), here, place.stage)

    def load(here: World) -> None:
        for saved, loaded in pairs:
            if loaded.ranks == here.size:
                out, newest = work / name(saved, loaded), Path("ckpt") / f"step_{SAVED:08d}"
                if here.first:
                    shutil.copytree(work / name(saved) / newest, out / newest)
                here.barrier()
                same = reopened(work, out / newest, here, loaded.stage)
                if here.first:
                    (out / "reopened.json").write_text(json.dumps(same))
                run(work, out, here, loaded.stage)

    together(1, work, data)
    for task, end in ((save, 0), (load, 1)):
        for size in sorted({pair[end].ranks for pair in pairs}):
            together(size, work, task)
    return [judged(work, *pair) for pair in pairs]


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line per place of saving, a column per place of loading."""
    cells = {(Place(**row["saved"]), Place(**row["loaded"])): _cell(row) for row in rows}
    columns = sorted({loaded for _, loaded in cells})
    lines = ["| saved \\ loaded | " + " | ".join(f"{c.ranks} ranks, {c.stage}" for c in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for saved in sorted({saved for saved, _ in cells}):
        found = (cells.get((saved, column), "") for column in columns)
        lines.append(f"| {saved.ranks} ranks, stage {saved.stage} | " + " | ".join(found) + " |")
    return "\n".join(lines)


def _cell(row: dict[str, Any]) -> str:
    odd = [key for key, value in row.items() if value is False and key != "ok"]
    return "differs: " + ", ".join(odd) if odd else "same bits" if row.get("bits") else f"{row['loss']:.0e}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS / "resume_matrix.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["DS_ACCELERATOR"] = "cpu"
    stages = range(4)
    pairs = [(Place(a, s), Place(b, t)) for a in (1, 2, 4) for s in stages for b in (1, 2, 3) for t in stages]
    if options.quick:
        pairs = [(Place(2, s), Place(b, t)) for s, b, t in ((1, 2, 1), (3, 2, 3), (3, 3, 0), (1, 1, 3), (3, 3, 2))]
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        rows = matrix(Path(folder), pairs)
    spent, good, facts = time.monotonic() - begin, sum(row["ok"] for row in rows), environment()
    odd = [row for row in rows if not row["ok"]]
    worst, norm = (max(row[kind] for row in rows) for kind in ("loss", "norm"))
    words = (
        f"{good} of {len(rows)} pairs are the same run; the next step's losses differ by {worst:.1e} at most, "
        f"the norm of its gradient by {norm:.1e}. "
        f"{spent / 60:.1f} minutes on {facts['hardware']} at load {facts['load']}, {facts['date']}, {facts['commit']}, "
        f"torch {facts['torch']}, DeepSpeed {deepspeed.__version__}."
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    head = (__doc__ or "").split("\n\n")[2]
    options.out.write_text(f"# Resume on other ranks and ZeRO stages\n\n{words}\n\n{head}\n\n{table(rows)}\n")
    options.out.with_suffix(".jsonl").write_text("".join(json.dumps({**facts, **row}) + "\n" for row in rows))
    print(words, *map(json.dumps, odd), sep="\n")
    return 1 if odd else 0


if __name__ == "__main__":
    sys.exit(main())
