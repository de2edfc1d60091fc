"""Where an injection is played: a run, a store and sources of its own, the fault, and what became of it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from medfast.drill import judge
from medfast.drill.disk import Mounts
from medfast.drill.judge import Expected
from medfast.drill.moments import STRUCK, Install
from medfast.drill.process import Command, Outcome, run

__all__ = ["EVERY", "STEPS", "Injection", "Scene", "Setup"]

STEPS, EVERY = 6, 2  # of a run; between its checkpoints


@dataclass(frozen=True)
class Setup:
    """What all injections share. references: (ranks, executor) -> folder of a fault-free run, and the seconds that it
    took: limits follow from them, as machines differ. mounts: whether this machine lets us have some."""

    command: Command
    config: Path
    overrides: tuple[str, ...]
    sources: Path
    store: Path
    references: Mapping[tuple[int, str], tuple[Path, float]]
    mounts: bool


def _nothing(scene: Scene) -> None:
    pass


@dataclass(frozen=True)
class Injection:
    """before: done to the files of the scene first. inject: what is installed in the process of ``rank``. after: the
    repair. struck: rank may end in any way; hangs: and is not waited for; absent: and is never started. begin: steps
    that the run has behind it, 0 or 4. options: overrides of the run with the fault; settings: and of the one after it,
    with {patience}. kept: a checkpoint of so many steps, at least, must be left. arguments: of prepare."""

    fault: str
    at: str
    expected: Expected
    before: Callable[[Scene], object] = _nothing
    inject: Callable[[Scene], Install] | None = None
    after: Callable[[Scene], object] = _nothing
    ranks: int = 1
    rank: int = 0
    struck: bool = False
    hangs: bool = False
    absent: bool = False
    begin: int = 0
    options: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    kept: int = 0
    executor: str = "torch"
    verb: str = "pretrain"
    needs_mounts: bool = False
    quick: bool = False


class Scene:
    """folder: that this injection has for itself. held: what an injection keeps open until its repair."""

    held: Any = None

    def __init__(self, setup: Setup, injection: Injection, folder: Path):
        self.setup, self.injection, self.folder = setup, injection, folder
        self.run, self.store, self.sources = folder / "run", folder / "store", folder / "sources"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        shutil.copytree(setup.store, self.store)
        self.reference, seconds = setup.references[injection.ranks, injection.executor]
        self.limit = 60 + 10 * seconds  # after which a run hangs
        self.patience = round(max(3.0, 1.5 * seconds), 1)  # given to a run to notice that something hangs
        if injection.begin:
            self._go_on()

    def _go_on(self) -> None:
        """The run folder as it is when a run was killed after ``begin`` steps."""
        shutil.copytree(self.reference, self.run)
        shutil.rmtree(self.checkpoint(STEPS))
        (self.run / "ckpt" / "latest").write_text(f"{self.checkpoint(self.injection.begin).name}\n")

    @cached_property
    def mounts(self) -> Mounts:
        return Mounts()

    def checkpoint(self, step: int) -> Path:
        return self.run / "ckpt" / f"step_{step:08d}"

    def volumes(self) -> list[Path]:
        return sorted((self.store / "volumes").iterdir())

    @property
    def weight(self) -> int:
        """Bytes of a checkpoint."""
        return sum(file.stat().st_size for file in (self.reference / "ckpt" / f"step_{STEPS:08d}").iterdir())

    def play(self) -> dict[str, Any]:
        """The line of drill.jsonl."""
        injection, expected = self.injection, self.injection.expected
        injection.before(self)
        outcome = self._launch(faulty=True)
        ok, got = expected.first(outcome, {injection.rank} if injection.struck else set())
        if injection.inject is not None and STRUCK not in outcome.text:
            ok, got = False, f"{got}; the moment of the fault never came"
        if expected.then == "again":
            injection.after(self)
            outcome = self._launch(faulty=False)
            fine, more = self._again(outcome)
            ok, got = ok and fine, f"{got}; once more: {more}"
        if not any(outcome.codes.values()):
            fine, more = self._result()
            ok, got = ok and fine, f"{got}; {more}"
        return {"fault": injection.fault, "injected_at": injection.at, "expected": str(expected), "got": got, "ok": ok}

    def _launch(self, faulty: bool) -> Outcome:
        injection, setup = self.injection, self.setup
        log = self.folder / ("first.log" if faulty else "again.log")
        if not faulty:
            return run(setup.command, self._arguments(), log, self.limit, injection.ranks)
        inject = {} if injection.inject is None else {injection.rank: injection.inject(self)}
        return run(
            setup.command, [*self._arguments(), *injection.options], log, self.limit, injection.ranks, inject,
            absent={injection.rank} if injection.absent else (), victims={injection.rank} if injection.hangs else (),
        )  # fmt: skip

    def _arguments(self) -> list[str]:
        setup, injection = self.setup, self.injection
        if injection.verb == "prepare":
            sources = self.sources if self.sources.exists() else setup.sources
            return ["data", "prepare", str(sources), "--store", str(self.store), "--max-bad", "0", "--jobs", "1"]
        return pretrain(setup.config, self.run, self.store, injection.executor, setup.overrides) + [
            setting.format(patience=self.patience) for setting in injection.settings
        ]

    def _again(self, outcome: Outcome) -> tuple[bool, str]:
        fine, got = Expected().first(outcome, set())
        if self.injection.verb == "prepare":
            return fine, got
        found = re.search(r"resuming after (\d+) steps", outcome.text)
        begun = int(found[1]) if found else 0
        lost = "" if begun >= self.injection.kept else f", although a checkpoint of {self.injection.kept} was whole"
        return fine and not lost, f"{got} from step {begun} on{lost}"

    def _result(self) -> tuple[bool, str]:
        """Whether what is there in the end is right, and a sentence about it."""
        if self.injection.expected.then == "skipped":
            step = int(re.findall(r"\d+", self.injection.at)[0])
            wrong = judge.announced(judge.rows(self.run), judge.rows(self.reference), step)
            return not wrong, wrong or "one step skipped, those before it as in the fault-free run, the rest finite"
        if self.injection.expected.then == "said":
            wrong = judge.complete(judge.rows(self.run), STEPS)
            return not wrong, wrong or "all steps are there, and finite"
        if self.injection.verb == "prepare":
            mine, theirs = judge.contents(self.store), judge.contents(self.setup.store)
        else:
            mine, theirs = (judge.fingerprint(folder, STEPS) for folder in (self.run, self.reference))
        odd = sorted(name for name in {*mine, *theirs} if mine.get(name) != theirs.get(name))
        if not odd:
            return True, "the fault-free result, bit for bit"
        return False, f"DEVIATES from the fault-free result in {', '.join(odd[:4])}"


def pretrain(config: Path, out: Path, store: Path, executor: str, overrides: tuple[str, ...]) -> list[str]:
    """The command line of a short run."""
    own = {"steps": STEPS, "batch": 2, "checkpoint_every": EVERY, "keep_last": 3, "validate_every": 0,
           "validate_crops": 1, "strategy": "ddp", "resume": "auto"}  # fmt: skip
    return ["pretrain", str(config), "--tiny", *(f"train.{name}={value}" for name, value in own.items()),
            "data.workers=1", f"data.executor={executor}", *overrides, f"out={out}", f"data.store={store}"]  # fmt: skip
