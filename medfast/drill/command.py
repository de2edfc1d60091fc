"""``medfast drill CONFIG``: fault-free runs first, then one injection after another."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from medfast.drill import table
from medfast.drill.disk import Mounts, write_sources
from medfast.drill.process import FORK, Command, bind, run
from medfast.drill.scene import Injection, Scene, Setup, pretrain

__all__ = ["drill"]

SOURCES = 5
RUNS_IMPORT = ("medfast.config", "medfast.data.loader", "medfast.data.prepare", "nibabel", "safetensors.torch",
               "tensorboard.compat.proto.event_pb2", "tensorboard.summary.writer.record_writer", "yaml")  # fmt: skip
OURS = ("out", "data.store", "data.executor", "data.workers", "train.steps", "train.batch", "train.checkpoint_every",
        "train.keep_last", "train.validate_every", "train.resume")  # fmt: skip


def drill(
    config: Path, overrides: Sequence[str], out: Path, command: Command, *, quick: bool = False, only: str | None = None
) -> int:
    """Play all injections, or the ``quick`` ones, or those with ``only`` in their name, and write ``out``/drill.jsonl.

    config, overrides: as of pretrain; the run is shrunk as --tiny does, to six steps on a store that is made here.
    command: what the runs call with their arguments, ``medfast.__main__.main``. Returns 0 where all went as expected,
    else 1. Raises ValueError for an override of what the drill needs, where nothing fits ``only``, and for a
    configuration that does not run even without a fault.
    """
    for override in overrides:
        if override.partition("=")[0] in OURS:
            raise ValueError(f"{override}: the drill sets {', '.join(OURS)} itself, or its moments would not come")
    chosen = [x for x in table.injections() if (x.quick or not quick) and (only or "") in f"{x.fault}, {x.at}"]
    if not chosen:
        names = sorted({x.fault for x in table.injections()})
        raise ValueError(f"there is no injection with {only!r} in its name; the faults are {', '.join(names)}")
    for module in RUNS_IMPORT:  # once, here, and not in each of the processes that are forked from this one
        import_module(module)
    scenes = out / "scenes"
    shutil.rmtree(scenes, ignore_errors=True)
    scenes.mkdir(parents=True)
    setup = _setup(config, tuple(overrides), scenes, command, chosen)
    rows = []
    with (out / "drill.jsonl").open("w", buffering=1) as lines:
        for number, injection in enumerate(chosen, 1):
            begin = time.monotonic()
            rows.append(_play(setup, injection, scenes / f"{number:02d}"))
            lines.write(json.dumps(rows[-1]) + "\n")
            _tell(number, len(chosen), rows[-1], time.monotonic() - begin)
    return _conclude(rows, out)


def _setup(
    config: Path, overrides: tuple[str, ...], folder: Path, command: Command, chosen: Iterable[Injection]
) -> Setup:
    """Sources, store and fault-free runs."""
    sources, store = folder / "sources", folder / "store"
    write_sources(sources, SOURCES)
    _must(command, ["data", "prepare", str(sources), "--store", str(store), "--jobs", "1"], folder / "prepare.log")
    references = {}
    for ranks, executor in sorted({(1, "torch"), *((x.ranks, x.executor) for x in chosen if not _lacking(x))}):
        out = folder / f"reference_{ranks}_{executor}"
        print(f"fault-free run on {ranks} rank(s), executor {executor} ...", file=sys.stderr, flush=True)
        seconds = _must(command, pretrain(config, out, store, executor, overrides), folder / f"{out.name}.log", ranks)
        references[ranks, executor] = out, seconds
    return Setup(command, config.absolute(), overrides, sources, store, references, _may_mount())


def _must(command: Command, arguments: list[str], log: Path, ranks: int = 1) -> float:
    outcome = run(command, arguments, log, 1800, ranks)
    if any(outcome.codes.values()):
        raise ValueError(f"this does not run even without a fault: {' '.join(arguments)}\n{outcome.text[-2000:]}")
    return outcome.seconds


def _may_mount() -> bool:
    """Whether a process of ours may have mounts of its own."""
    process = FORK.Process(target=_try_mounts)
    process.start()
    process.join()
    return process.exitcode == 0


def _try_mounts() -> None:
    try:
        Mounts()
    except OSError:
        sys.exit(1)


def _lacking(injection: Injection) -> str:
    """What this machine lacks for an injection."""
    if injection.executor == "dali" and not (find_spec("nvidia") and find_spec("nvidia.dali")):
        return "DALI is not installed, and without it workers are threads"
    return ""


def _play(setup: Setup, injection: Injection, folder: Path) -> dict[str, Any]:
    """In a process of its own, whose mounts end with it."""
    lacking = _lacking(injection)
    if injection.needs_mounts and not setup.mounts:
        lacking = "this system lets nobody have mounts of his own here"
    if lacking:
        return {"fault": injection.fault, "injected_at": injection.at, "expected": str(injection.expected),
                "got": f"not tried: {lacking}", "ok": None}  # fmt: skip
    receive, send = FORK.Pipe(duplex=False)
    process = FORK.Process(target=_staged, args=(setup, injection, folder, send))
    process.start()
    send.close()
    try:
        row = json.loads(receive.recv_bytes())
    except EOFError:
        row = {"fault": injection.fault, "injected_at": injection.at, "expected": str(injection.expected),
               "got": "the drill itself failed, see its error above", "ok": False}  # fmt: skip
    process.join()
    if row["ok"]:
        shutil.rmtree(folder, ignore_errors=True)
    return row


def _staged(setup: Setup, injection: Injection, folder: Path, send: Any) -> None:
    bind()
    row = Scene(setup, injection, folder).play()
    send.send_bytes(json.dumps(row).encode())


def _tell(number: int, count: int, row: dict[str, Any], seconds: float) -> None:
    verdict = {True: "ok", False: "NOT OK", None: "not tried"}[row["ok"]]
    print(f"[{number}/{count}] {verdict}: {row['fault']}, {row['injected_at']} ({seconds:.1f} s)\n      {row['got']}",
          flush=True)  # fmt: skip


def _conclude(rows: list[dict[str, Any]], out: Path) -> int:
    wrong, untried = (sum(row["ok"] is verdict for row in rows) for verdict in (False, None))
    kinds = len({row["fault"] for row in rows})
    print(f"{len(rows)} injections of {kinds} kinds of fault: {len(rows) - wrong - untried} as expected, {wrong} not, "
          f"{untried} not tried. {out / 'drill.jsonl'}")  # fmt: skip
    if wrong:
        print(f"logs of those that did not go as expected: {out / 'scenes'}")
    return int(wrong > 0)
