"""What is known of the backends on a device: verdicts shipped with the package, and those ``qualify`` stored here.

A verdict is JSON: of each operator and backend whether it is right and what it takes. One that is stored on this
machine holds for one device name, torch version and build of this package. One that is shipped (_verdicts/sm_90.json,
made by ``qualify`` on such a device) holds for a device family, and for its forerunner too ("inferred"), because the
kernels for that one are held to budgets ahead of time (tests/kernels/budgets.json).
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

HERE = Path(__file__).parent
SUCCESSOR = {"sm_80": "sm_90"}


class Evidence(NamedTuple):
    """verdict: operator -> backend -> {"correct": bool, "ms": float, "reference_ms": float, ...}; source: its file."""

    verdict: dict[str, dict[str, dict[str, Any]]]
    source: Path
    inferred: bool = False

    def proven(self, operator: str) -> list[str]:
        """Backends that are right and faster than the reference, the fastest first."""
        rows = {
            name: row
            for name, row in self.verdict.get(operator, {}).items()
            if row["correct"] and row["ms"] < row["reference_ms"]
        }
        return sorted(rows, key=lambda name: rows[name]["ms"])


def cache_folder() -> Path:
    """Where this user's verdicts and launch configurations are: MEDFAST_CACHE, else the cache folder of the system."""
    if folder := os.environ.get("MEDFAST_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "medfast"


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.is_file() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return name or platform.processor() or platform.machine() or device.type


def family(device: torch.device) -> str:
    """sm_90 and the like; cpu."""
    if device.type != "cuda":
        return device.type
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


@cache
def build_hash() -> str:
    """Of everything that runs: this package's Python and its C++ library."""
    digest = hashlib.sha256()
    for path in sorted([*HERE.rglob("*.py"), *HERE.glob("_csrc.so")]):
        digest.update(str(path.relative_to(HERE)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def verdict_path(device: torch.device) -> Path:
    """The file of this device, torch and build."""
    name = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    return cache_folder() / "verdicts" / f"{name}-torch-{torch.__version__}-{build_hash()}.json"


def store(path: Path, content: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arriving = path.with_name(f".{path.name}.{os.getpid()}")
    arriving.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    arriving.replace(path)


@cache
def evidence(device: torch.device) -> tuple[Evidence, ...]:
    """What there is for this device, the best first: its own verdict, its family's, that of its family's successor."""
    shipped, name = HERE / "_verdicts", family(device)
    places = [(verdict_path(device), False), (shipped / f"{name}.json", False)]
    places += [(shipped / f"{SUCCESSOR[name]}.json", True)] if name in SUCCESSOR else []
    return tuple(Evidence(_read(path), path, inferred) for path, inferred in places if path.is_file())


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))["operators"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no verdict ({error}): delete it, and let `qualify` write it again") from error
