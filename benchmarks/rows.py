"""Rows of benchmarks/results/*.jsonl: append-only, each with date, commit, hardware and versions.

MEDFAST_RESULTS: another folder for them.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(os.environ.get("MEDFAST_RESULTS") or ROOT / "benchmarks" / "results")
SOURCES = ("csrc", "kernels", "medfast", "configs", "benchmarks", ":!benchmarks/results")


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"a row names the commit that was measured, and git does not say it: {done.stderr.strip()}")
    return done.stdout.strip()


def _processor() -> str:
    """Name, family and model: virtual machines give processors of several generations one name."""
    info = Path("/proc/cpuinfo")
    pairs = (line.split(":", 1) for line in (info.read_text().splitlines() if info.is_file() else []) if ":" in line)
    said = {name.strip(): value.strip() for name, value in pairs}
    name = said.get("model name") or platform.processor() or platform.machine()
    which = f", family {said['cpu family']} model {said['model']}" if {"cpu family", "model"} <= said.keys() else ""
    return f"{name}{which}, {torch.get_num_threads()} threads"


def environment(device: str = "cpu") -> dict[str, object]:
    """What every row says of where it was measured. ``MEDFAST_COMMIT`` stands in where there is no git folder."""
    hardware = torch.cuda.get_device_name() if device == "cuda" else _processor()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": os.environ.get("MEDFAST_COMMIT") or _git("rev-parse", "--short", "HEAD"),
        "hardware": hardware, "load": round(os.getloadavg()[0], 1), "torch": torch.__version__,
    }  # fmt: skip


def append(name: str, rows: list[dict]) -> None:
    """Add rows to results/<name>.jsonl; a working tree that is not its commit writes none, and says so."""
    changed = "" if os.environ.get("MEDFAST_COMMIT") else _git("status", "--porcelain", "--", *SOURCES)
    if changed:
        print(f"no rows are written, because the working tree is not its commit:\n{changed}", file=sys.stderr)
        return
    RESULTS.mkdir(parents=True, exist_ok=True)
    with (RESULTS / f"{name}.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
