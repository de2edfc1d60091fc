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

from medfast.training import checkpoint
from medfast.training.settings import Optim, Train
from medfast.types import Objective

__all__ = ["check_init", "check_same", "fingerprint", "initialise", "resolve"]

_ENOUGH = 0.95  # share of the wanted numbers that must be found in other weights
_FREE = {  # keys that change no result, or only its rounding: where and how fast a run goes
    "train.strategy", "train.micro", "train.compile", "train.validate_every", "train.validate_crops",
    "train.checkpoint_every", "train.keep_last", "train.resume", "train.resume_changed", "data.store", "data.workers",
    "deepspeed.zero_optimization.stage",
}  # fmt: skip


def resolve(config: Mapping[str, Any]) -> tuple[dict[str, Any], Train, Optim]:
    """(the configuration with every default of train and optim written out, Train, Optim)."""
    train, optim = Train(**(config.get("train") or {})), Optim(**(config.get("optim") or {}))
    return {**config, "optim": asdict(optim), "train": asdict(train)}, train, optim


def fingerprint(resolved: Mapping[str, Any], volumes: list[str]) -> dict[str, Any]:
    """The settings that decide a run's results, "section.key" -> value; the store by its volumes, not its path."""
    flat = {}
    for section in ("objective", "data", "optim", "train", "deepspeed"):
        flat |= _flatten(section, resolved.get(section) or {})
    kept = {name: value for name, value in flat.items() if name not in _FREE}
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


def check_init(init: Mapping[str, Any]) -> None:
    """ValueError where ``init`` names no weights to take, or no part that there is."""
    if not init.get("from"):
        raise ValueError("init.from is missing: give a run folder, a checkpoint or a .safetensors file, or init=null")
    if init.get("part") not in ("student", "teacher", None):
        raise ValueError(f"init.part is student or teacher, got {init['part']!r}")


@torch.no_grad()
def initialise(objective: Objective, init: Mapping[str, Any], say: Callable[[str], None]) -> None:
    """Fill the student from other weights (continued pretraining); the teacher becomes its copy afterwards.

    init: {from: a checkpoint folder, a run folder or a .safetensors file, part: student (default) | teacher,
    allow_partial: false}. Says what matched; ValueError when less than 95 % of the numbers did.
    """
    check_init(init)
    part = init.get("part") or "student"
    given = _weights(Path(init["from"]), part)
    own = checkpoint.describe(objective)
    wanted = {**own["student"], **own["state"]}
    if part == "teacher" and objective.teacher is not None:
        wanted = {name: x for name, x in wanted.items() if name in own["teacher"]}
    matched = [name for name, x in wanted.items() if name in given and given[name].shape == x.shape]
    missing = sorted(set(wanted) - set(matched))
    share = sum(wanted[name].numel() for name in matched) / max(sum(x.numel() for x in wanted.values()), 1)
    some = f" ({', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''})" if missing else ""
    told = f"{len(matched)} tensors matched, {len(missing)} missing or of another shape{some}: {share:.1%} of all"
    if share < _ENOUGH and not init.get("allow_partial"):
        raise ValueError(f"init.from: {told}; under {_ENOUGH:.0%} is refused, init.allow_partial=true takes it")
    for name in matched:
        wanted[name].copy_(given[name])
    say(f"init from the {part} of other weights: {told}")


def _weights(path: Path, part: str) -> dict[str, Tensor]:
    if path.is_dir():
        folder = path if (path / "meta.json").exists() else checkpoint.latest(path)
        if folder is None:
            raise ValueError(f"init.from: {path} holds no finished checkpoint")
        parts, _ = checkpoint.load(folder)
        return {**parts["state"], **parts[part]}
    if path.suffix != ".safetensors" or not path.exists():
        raise ValueError(f"init.from is a checkpoint folder or a .safetensors file that exists, got {path}")
    from safetensors.torch import load_file

    return load_file(path)
