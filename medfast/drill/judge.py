"""What a run must do about a fault, and whether it did."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medfast.drill.moments import STRUCK
from medfast.drill.process import Outcome

__all__ = ["Expected", "announced", "complete", "contents", "fingerprint", "rows"]

TYPED = {0: "done", 2: "usage", 3: "data integrity", 4: "alarm", 69: "a rank is lost", 74: "disk", 75: "preempted"}
TRACE = "Traceback (most recent call last)"


@dataclass(frozen=True)
class Expected:
    """codes: exit codes that are right, of every rank that was not made to fail. words: a pattern that a line of the
    output must have. then: what follows. "same": this run gives the fault-free result bit for bit. "again": so does the
    same command, once more and without the fault. "skipped": the run goes to its end without what was spoilt, and says
    so in a sentence and in the metrics. "said": it goes to its end on other data, and says so in a sentence."""

    codes: tuple[int, ...] = (0,)
    words: str = ""
    then: str = "same"

    def __str__(self) -> str:
        codes = " or ".join("killed" if code == -9 else f"exit {code}" for code in self.codes)
        told = f", a sentence with {self.words!r}" if self.words else ""
        then = {"same": "the fault-free result", "again": "the same command once more gives the fault-free result",
                "skipped": "the metrics say which step", "said": "all steps are there"}[self.then]  # fmt: skip
        return f"{codes}{told}; {then}"

    def first(self, outcome: Outcome, spared: set[int]) -> tuple[bool, str]:
        """Judge how the run with the fault ended. spared: ranks that may end in any way, as the fault struck them."""
        codes = {rank: code for rank, code in outcome.codes.items() if rank not in spared}
        wrong = [code for code in codes.values() if code not in self.codes]
        sentence = _sentence(outcome.text, self.words)
        crash = TRACE in outcome.text and -9 not in self.codes
        got = ", ".join(sorted({_exit(code) for code in codes.values()}))
        if sentence:
            got += f": {sentence}"
        elif crash:
            got += f", and no sentence but a traceback: {_last(outcome.text)}"
        elif self.words:
            got += f", and no sentence with {self.words!r}: {_last(outcome.text)}"
        if crash and sentence:
            got += "; with a traceback"
        return not wrong and not crash and bool(sentence or not self.words), got


def _exit(code: int | None) -> str:
    if code is None:
        return "hangs"
    return f"killed by signal {-code}" if code < 0 else f"exit {code} ({TYPED.get(code, 'no typed exit')})"


def _sentence(text: str, words: str) -> str:
    found = [line for line in text.splitlines() if words and re.search(words, line)]
    return " ".join(found[-1].split())[:400] if found else ""


def _last(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip() and line != STRUCK]
    return " ".join(lines[-1].split())[:300] if lines else "it said nothing"


def fingerprint(run: Path, step: int) -> dict[str, str]:
    """Everything that a run leaves behind of its result: a hash of each file of tensors of its last checkpoint, and of
    its metrics without their timings. {} where it did not get there."""
    folder = run / "ckpt" / f"step_{step:08d}"
    if not (folder / "COMPLETE").exists():
        return {}
    found = {file.name: _sha256(file.read_bytes()) for file in sorted(folder.glob("*.safetensors"))}
    return {**found, "metrics.jsonl": _sha256(json.dumps(rows(run), sort_keys=True).encode())}


def rows(run: Path) -> list[dict[str, Any]]:
    """The metrics of a run without what differs between two runs of the same bits."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "time"} for row in found]


def announced(mine: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]], step: int) -> str:
    """What is wrong with the metrics of a run that skipped ``step``, beside one that did not; "" if nothing."""
    if [row["step"] for row in mine] != [row["step"] for row in theirs]:
        return f"the metrics hold the steps {[row['step'] for row in mine]}"
    said = [row["step"] for row in mine if row.get("skipped")]
    if said != [step]:
        return f"the metrics say that the steps {said} were skipped"
    if mine[:step] != theirs[:step]:
        return "steps before the skipped one differ from the fault-free run"
    if not all(math.isfinite(x) for row in mine[step + 1 :] for x in (row["total"], row["grad_norm"])):
        return "a step after the skipped one is not finite"
    return ""


def complete(mine: Sequence[Mapping[str, Any]], steps: int) -> str:
    """What is wrong with the metrics of a run that went on with other data; "" if nothing."""
    if [row["step"] for row in mine] != list(range(steps)):
        return f"the metrics hold the steps {[row['step'] for row in mine]}"
    return "" if all(math.isfinite(row["total"]) for row in mine) else "a loss is not finite"


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def contents(store: Path) -> dict[str, str]:
    """A hash of everything in a store but what is private to it."""
    index = store / "index.jsonl"
    lines = sorted(index.read_bytes().splitlines()) if index.exists() else []
    files = [file for file in sorted(store.rglob("*")) if file.is_file() and file != index]
    public = [file for file in files if not {"private", ".lock"} & {*file.relative_to(store).parts}]
    return {"index.jsonl": _sha256(b"\n".join(lines)),
            **{str(file.relative_to(store)): _sha256(file.read_bytes()) for file in public}}  # fmt: skip
