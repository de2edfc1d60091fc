"""Faults of the run folder: damaged checkpoints, what killed runs leave behind, settings that changed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from medfast.drill import disk
from medfast.drill.judge import Expected
from medfast.drill.scene import Injection, Scene

__all__ = ["damaged", "leftovers", "other_settings"]


def _newest(name: str, change: Callable[[Path], object]) -> Callable[[Scene], object]:
    return lambda scene: change(scene.checkpoint(4) / name)


def _garble(file: Path) -> None:
    file.write_bytes(b"\x00\xff{" * 40)


def _spoil_all(scene: Scene) -> None:
    for folder in (scene.run / "ckpt").glob("step_*"):
        disk.flip(folder / "student.safetensors")


def _empty(scene: Scene) -> None:
    shutil.rmtree(scene.checkpoint(4))
    scene.checkpoint(4).mkdir()


def damaged() -> list[Injection]:
    def spoilt(at: str, words: str, before: Callable[[Scene], object], quick: bool = False) -> Injection:
        return Injection("damaged newest checkpoint", f"{at}, before the resume", Expected(words=words), before=before,
                         begin=4, quick=quick)  # fmt: skip

    older = "step_00000004 is ignored: .*"
    return [
        spoilt("one bit of the student", f"{older}student.safetensors", _newest("student.safetensors", disk.flip),
               quick=True),
        spoilt("one bit of the teacher", f"{older}teacher.safetensors", _newest("teacher.safetensors", disk.flip)),
        spoilt("one bit of the header of the moments", f"{older}optimizer.safetensors",
               _newest("optimizer.safetensors", lambda file: disk.flip(file, 0.0))),
        spoilt("moments cut to half", f"{older}optimizer.safetensors", _newest("optimizer.safetensors", disk.cut)),
        spoilt("state deleted", f"{older}cannot be read", _newest("state.safetensors", os.unlink)),
        spoilt("one bit of meta.json", f"{older}meta.json", _newest("meta.json", disk.flip)),
        spoilt("rubbish for checksums", f"{older}cannot be read", _newest("checksums.json", _garble)),
        spoilt("no COMPLETE", f"{older}COMPLETE", _newest("COMPLETE", os.unlink)),
        spoilt("an empty folder", f"{older}COMPLETE", _empty),
        spoilt("and the one before it", "step_00000002 is ignored", _spoil_all),
    ]  # fmt: skip


def _in_run(name: str, change: Callable[[Path], object]) -> Callable[[Scene], object]:
    return lambda scene: change(scene.run / name)


def _leave_unfinished(scene: Scene) -> None:
    for name in (".step_00000006.unfinished", ".step_00000004.unfinished"):
        folder = scene.run / "ckpt" / name
        folder.mkdir()
        (folder / "student.safetensors").write_bytes(b"half a student")
    (scene.run / "ckpt" / ".latest.unfinished.txt").write_text("step_000")
    (scene.run / ".metrics.unfinished").write_text('{"step": 0}\n')


def _tear(file: Path) -> None:
    """The last line is half written."""
    file.write_bytes(file.read_bytes()[:-25])


def leftovers() -> list[Injection]:
    def harmless(fault: str, at: str, before: Callable[[Scene], object], quick: bool = False) -> Injection:
        return Injection(fault, f"{at}, before the resume", Expected(), before=before, begin=4, quick=quick)

    return [
        harmless("stale lock", "what a killed run had begun to write", _leave_unfinished, True),
        harmless("torn metrics", "last line half written", _in_run("metrics.jsonl", _tear)),
        harmless("torn metrics", "the pointer to the newest checkpoint is rubbish", _in_run("ckpt/latest", _garble)),
        harmless("torn metrics", "the pointer to the newest checkpoint is gone", _in_run("ckpt/latest", os.unlink)),
    ]


def other_settings() -> list[Injection]:
    def refused(fault: str, option: str, words: str, **more) -> Injection:
        return Injection(fault, f"{option}, at the resume after 4 steps", Expected((2,), words, "again"), begin=4,
                         kept=4, options=tuple(option.split()), **more)  # fmt: skip

    def fewer_volumes(scene: Scene) -> None:
        index = scene.store / "index.jsonl"
        index.write_bytes(b"".join(index.read_bytes().splitlines(keepends=True)[:2]))

    def put_back(scene: Scene) -> None:
        shutil.copy(scene.setup.store / "index.jsonl", scene.store)

    return [
        refused("wrong recipe", "optim.lr=0.123", "optim.lr: .* in the checkpoint, 0.123 now", quick=True),
        refused("wrong recipe", "train.seed=7", "train.seed: .* in the checkpoint, 7 now"),
        refused("wrong recipe", "data.foreground=false data.holdout=0.5", "data\\..* in the checkpoint"),
        Injection("wrong recipe", "a store of other volumes, at the resume after 4 steps",
                  Expected((2,), "data.store .its volumes.: .* in the checkpoint", "again"), before=fewer_volumes,
                  after=put_back, begin=4, kept=4),
    ]  # fmt: skip
