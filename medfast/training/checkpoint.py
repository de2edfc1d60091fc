"""Checkpoints: safetensors by canonical parameter name, the same for every strategy and number of ranks.

    ckpt/step_00000020/{student,teacher,optimizer,state}.safetensors meta.json checksums.json COMPLETE
    ckpt/latest                                                       name of the newest folder

A folder is written under another name, synced, marked COMPLETE and renamed, so it is there as a whole or not at all.
Where the step has a folder already, that one is step_00000020.aside until the new one is in its place.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medfast.types import Objective

__all__ = ["describe", "drop_after", "latest", "load", "read_into", "restore", "save", "snapshot"]

PARTS = ("student", "teacher", "optimizer", "state")
_META, _SUMS, _DONE = "meta.json", "checksums.json", "COMPLETE"
_NAMES = ("step_{:08d}", ".step_{:08d}.unfinished", "step_{:08d}.aside")
_FOLDER = re.compile(r"step_\d+(\.aside)?")


def describe(objective: Objective) -> dict[str, dict[str, Tensor]]:
    """The tensors of an objective by part: student (parameters), teacher, state (buffers that are kept)."""
    student: dict[str, Tensor] = dict(objective.named_parameters())
    state = {name: x for name, x in objective.state_dict(keep_vars=True).items() if name not in student}
    return {"student": student, "teacher": objective.teacher.state() if objective.teacher else {}, "state": state}


def save(
    run: Path, step: int, parts: Mapping[str, Mapping[str, Tensor]], meta: Mapping[str, Any], keep: int,
    say: Callable[[str], None] = print, every: int = 0,
) -> Path:  # fmt: skip
    """Write the checkpoint after ``step`` optimizer steps and drop all but the newest ``keep`` and those of every
    ``every``-th step; returns its folder. OSError for a disk that does not take it: the others are as they were."""
    root = Path(run) / "ckpt"
    folder, unfinished, aside = (root / name.format(step) for name in _NAMES)
    root.mkdir(parents=True, exist_ok=True)
    for old in root.glob(".*.unfinished"):
        shutil.rmtree(old)
    try:
        _write(unfinished, step, parts, meta)
    except OSError:
        shutil.rmtree(unfinished, ignore_errors=True)  # what it holds may be what fills the disk
        raise
    if folder.exists():  # an earlier run's, or damaged; at no moment is there none of the two
        if aside.exists():
            shutil.rmtree(aside)
        folder.rename(aside)
    unfinished.rename(folder)
    if aside.exists():
        shutil.rmtree(aside)
    _sync(root)
    _point(root, folder.name)
    _prune(root, step, keep, every, say)
    return folder


def snapshot(parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Copies on the CPU that do not change when training goes on, and share no memory, which safetensors refuses."""
    return {part: {name: x.detach().to("cpu", copy=True).contiguous() for name, x in named.items()}
            for part, named in parts.items()}  # fmt: skip


def _write(
    unfinished: Path, step: int, parts: Mapping[str, Mapping[str, Tensor]], meta: Mapping[str, Any]
) -> None:  # fmt: skip
    """A whole checkpoint under a name that nobody reads yet, on the disk when this returns."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    unfinished.mkdir()
    for part in PARTS:
        # clone: safetensors refuses tensors that share memory, and ZeRO's parameters are views of one buffer
        tensors = {name: x.detach().cpu().clone().contiguous() for name, x in parts[part].items()}
        try:
            save_file(tensors, unfinished / f"{part}.safetensors")
        except SafetensorError as error:  # its word for what a disk says
            raise OSError(f"{part}.safetensors: {error}") from error
    (unfinished / _META).write_text(json.dumps({**meta, "step": step}, indent=1, sort_keys=True))
    sums = {path.name: _sha256(path) for path in sorted(unfinished.iterdir())}
    (unfinished / _SUMS).write_text(json.dumps(sums, indent=1))
    for path in unfinished.iterdir():
        _sync(path)
    (unfinished / _DONE).touch()
    _sync(unfinished / _DONE)
    _sync(unfinished)


def drop_after(run: Path, step: int) -> None:
    """Delete the checkpoints of later steps than ``step``, the newest first: at every moment the newest is a good one
    to go on from for a run that is killed meanwhile."""
    for old in _folders(Path(run) / "ckpt"):
        if _step(old) > step:
            _remove(old)


def _remove(folder: Path) -> None:
    """Delete a checkpoint; half deleted it has a name that nobody reads."""
    going = folder.with_name(f".{folder.name}.unfinished")
    if going.exists():
        shutil.rmtree(going)
    folder.rename(going)
    shutil.rmtree(going)


def _prune(root: Path, step: int, keep: int, every: int, say: Callable[[str], None]) -> None:
    """Drop what is no use to a run that has just saved ``step``, then the whole ones that nobody wants to keep."""
    whole = []
    for old in _folders(root):
        if _step(old) > step:  # the run was resumed from before it, so it could not be read
            say(f"checkpoint {old.name} is deleted: it is of a later step than {step}, which the run has just reached")
            shutil.rmtree(old)
        elif not (old / _DONE).exists():
            say(f"checkpoint {old.name} is deleted: it has no {_DONE}")
            shutil.rmtree(old)
        else:
            whole.append(old)
    for old in whole[keep:]:
        if not every or _step(old) % every:
            _remove(old)


def _folders(root: Path) -> list[Path]:
    """Checkpoint folders, newest first, one set aside after its successor."""
    found = [path for path in root.glob("step_*") if _FOLDER.fullmatch(path.name)]
    return sorted(found, key=lambda path: (_step(path), not path.suffix), reverse=True)


def _step(folder: Path) -> int:
    return int(folder.stem.removeprefix("step_"))


def latest(run: Path | str, say: Callable[[str], None] = print, until: int | None = None) -> Path | None:
    """The newest whole checkpoint of a run folder, of step ``until`` at most, or None; says which newer ones it passes
    over because they are damaged, and why."""
    for folder in _folders(Path(run) / "ckpt"):
        if until is not None and _step(folder) > until:
            continue
        fault = _fault(folder)
        if fault is None:
            return folder
        say(f"checkpoint {folder.name} is ignored: {fault}")
    return None


def load(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """(tensors by part, meta) of a checkpoint, on the CPU. ValueError where it is not whole."""
    from safetensors.torch import load_file

    if fault := _fault(Path(folder)):
        raise ValueError(f"{folder} is no usable checkpoint: {fault}")
    parts = {part: load_file(Path(folder) / f"{part}.safetensors") for part in PARTS}
    return parts, json.loads((Path(folder) / _META).read_text())


@torch.no_grad()
def restore(objective: Objective, parts: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Fill student, teacher and buffers; ValueError where names or shapes are not exactly the objective's."""
    for part, own in describe(objective).items():
        given = parts[part]
        odd = sorted(set(own) ^ set(given)) or [name for name, x in own.items() if x.shape != given[name].shape]
        if odd:
            raise ValueError(f"the checkpoint's {part} does not fit: {len(odd)} tensors differ, first {odd[0]!r}")
        for name, tensor in own.items():
            tensor.copy_(given[name])


def read_into(objective: Objective, folder: Path) -> dict[str, Any]:
    """Fill student, teacher and buffers from a checkpoint folder; returns its meta."""
    parts, meta = load(folder)
    restore(objective, parts)
    return meta


def _fault(folder: Path) -> str | None:
    """Why a folder is no whole checkpoint, or None."""
    if not (folder / _DONE).exists():
        return "it has no COMPLETE"
    try:
        sums = json.loads((folder / _SUMS).read_text())
        wrong = [name for name, sum_ in sums.items() if _sha256(folder / name) != sum_]
    except (OSError, ValueError) as error:
        return f"it cannot be read ({type(error).__name__})"
    missing = sorted({_META, *(f"{part}.safetensors" for part in PARTS)} - set(sums))
    if missing:
        return f"its checksums lack {missing[0]}"
    return f"the checksum of {wrong[0]} is wrong" if wrong else None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    """fsync of a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _point(root: Path, name: str) -> None:
    pointer = root / ".latest.unfinished.txt"
    pointer.write_text(name + "\n")
    _sync(pointer)
    pointer.replace(root / "latest")
