"""Where a run starts: at nothing, at other weights (``init``), or where its own folder left off."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medfast.architectures.interop import ENOUGH, differences, match
from medfast.training import checkpoint
from medfast.training.settings import Optim, Train
from medfast.types import Objective

__all__ = ["BACKBONE", "check_init", "check_same", "described", "fingerprint", "initialise", "resolve"]

BACKBONE = "backbone."  # what an objective's checkpoint puts before the names of its encoder or network
_FREE = {  # keys that change no result, or only its rounding: where and how fast a run goes
    "train.strategy", "train.micro", "train.teacher", "train.compile", "train.validate_every", "train.validate_crops",
    "train.checkpoint_every", "train.keep_last", "train.keep_every", "train.watchdog_s", "train.skip_budget",
    "train.alarms", "train.rollbacks", "train.resume", "train.resume_changed", "data.store", "data.workers",
    "data.stage", "data.skip", "data.patience",
}  # fmt: skip
# Where things lie, and in which portions they are sent; what is asked for in trouble.
_FREE_SECTIONS = ("deepspeed.zero_optimization.", "train.alarms.")


def resolve(config: Mapping[str, Any]) -> tuple[dict[str, Any], Train, Optim]:
    """(the configuration with every default of train and optim written out, Train, Optim)."""
    train, optim = Train(**(config.get("train") or {})), Optim(**(config.get("optim") or {}))
    return {**config, "optim": asdict(optim), "train": asdict(train)}, train, optim


def fingerprint(resolved: Mapping[str, Any], volumes: list[str]) -> dict[str, Any]:
    """The settings that decide a run's results, "section.key" -> value; the store by its volumes, not its path."""
    flat = {}
    for section in ("objective", "data", "optim", "train", "deepspeed"):
        flat |= _flatten(section, resolved.get(section) or {})
    kept = {name: value for name, value in flat.items() if name not in _FREE and not name.startswith(_FREE_SECTIONS)}
    kept["data.store (its volumes)"] = hashlib.sha256(json.dumps(sorted(volumes)).encode()).hexdigest()[:16]
    return json.loads(json.dumps(kept))


def _flatten(prefix: str, section: Mapping[str, Any]) -> dict[str, Any]:
    flat = {}
    for key, value in section.items():
        name = f"{prefix}.{key}"
        flat |= _flatten(name, value) if isinstance(value, Mapping) else {name: value}
    return flat


def check_same(saved: Mapping[str, Any], now: Mapping[str, Any], changed: bool, say: Callable[[str], None]) -> None:
    """ValueError naming the settings that differ from the checkpoint's, unless ``changed`` allows it."""
    odd = [name for name in sorted({*saved, *now}) if saved.get(name) != now.get(name)]
    if not odd:
        return
    told = "; ".join(f"{name}: {saved.get(name)!r} in the checkpoint, {now.get(name)!r} now" for name in odd)
    if not changed:
        hint = " Rates, temperatures and momentum follow t = step / steps, so a longer run is another run."
        raise ValueError(
            f"the run folder holds a run with other settings ({told}).{hint if 'train.steps' in odd else ''} Give "
            "another out=FOLDER, or train.resume_changed=true to go on from its weights all the same"
        )
    say(f"resuming although settings changed: {told}")


def check_init(init: Mapping[str, Any], backbone: Mapping[str, Any] | None = None) -> None:
    """ValueError where ``init`` names no weights to take, or no part that there is, or a file of a backbone that
    computes something else than ``backbone``, the section of this run's, with the same weights."""
    if not init.get("from"):
        raise ValueError("init.from is missing: give a run folder, a checkpoint or a .safetensors file, or init=null")
    if init.get("part") not in ("student", "teacher", None):
        raise ValueError(f"init.part is student or teacher, got {init['part']!r}")
    path = Path(init["from"])
    about = described(path) if path.suffix == ".safetensors" and path.is_file() else None
    if about is None or backbone is None or about["architecture"]["name"] != backbone.get("name"):
        return
    odd = differences(about["architecture"], backbone)
    if odd:
        told = "; ".join(f"{name}: {theirs!r} there, {ours!r} here" for name, (theirs, ours) in odd.items())
        raise ValueError(
            f"init.from holds weights of a network that computes with other settings ({told}): set them in "
            "objective.backbone, they are in the config.json beside the weights"
        )


@torch.no_grad()
def initialise(objective: Objective, init: Mapping[str, Any], say: Callable[[str], None]) -> None:
    """Fill the student from other weights (continued pretraining); the teacher becomes its copy afterwards.

    init: {from: a checkpoint folder, a run folder or a .safetensors file, part: student (default) | teacher,
    allow_partial: false}. A file that `medfast import` or `medfast export` wrote fills the backbone alone. Says what
    matched; ValueError when less than 95 % of the numbers did.
    """
    check_init(init)
    part = init.get("part") or "student"
    given, alone = _weights(Path(init["from"]), part)
    own = checkpoint.describe(objective)
    wanted = {**own["student"], **own["state"]}
    if alone:
        wanted = {name: x for name, x in wanted.items() if name.startswith(BACKBONE)}
        given = {BACKBONE + name: x for name, x in given.items()}
    elif part == "teacher" and objective.teacher is not None:
        wanted = {name: x for name, x in wanted.items() if name in own["teacher"]}
    found = match(wanted, given)
    if found.share < ENOUGH and not init.get("allow_partial"):
        raise ValueError(f"init.from: {found}; under {ENOUGH:.0%} is refused, init.allow_partial=true takes it")
    for name in found.matched:
        wanted[name].copy_(given[name])
    say(f"init from {'a backbone' if alone else f'the {part} of other weights'}: {found}")


def _weights(path: Path, part: str) -> tuple[dict[str, Tensor], bool]:
    """Weights by name, and whether they are those of a backbone alone."""
    if path.is_dir():
        folder = path if (path / "meta.json").exists() else checkpoint.latest(path)
        if folder is None:
            raise ValueError(f"init.from: {path} holds no finished checkpoint")
        parts, _ = checkpoint.load(folder)
        return {**parts["state"], **parts[part]}, False
    if path.suffix != ".safetensors" or not path.exists():
        raise ValueError(f"init.from is a checkpoint folder or a .safetensors file that exists, got {path}")
    from safetensors.torch import load_file

    about = described(path)
    if about is not None and about["format"] != "medfast":
        raise ValueError(
            f"init.from: {path.name} has the format {about['format']!r}: turn it round with medfast import"
        )
    return load_file(path), about is not None


def described(path: Path) -> dict[str, Any] | None:
    """What a .safetensors file that medfast wrote says of itself, None where it says nothing."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    return json.loads(metadata["medfast"]) if "medfast" in metadata else None
