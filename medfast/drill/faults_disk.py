"""Disks that are full, read-only or slow."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from medfast.drill.disk import limit_files
from medfast.drill.judge import Expected
from medfast.drill.moments import Install, at_file, at_step, delay
from medfast.drill.scene import Injection, Scene

__all__ = ["full", "read_only", "slow"]

WRITING = (74,)  # exit code: a file could not be written
LARGE = 1 << 30


def full() -> list[Injection]:
    refused = Expected(WRITING, "could not be written.*(No space left|File too large)", "again")

    def small(checkpoints: float) -> dict[str, Any]:
        return {"before": lambda scene: scene.mounts.small(scene.run / "ckpt", int(checkpoints * scene.weight)),
                "after": lambda scene: scene.mounts.grow(scene.run / "ckpt", LARGE)}  # fmt: skip

    def no_large_file(step: int) -> Callable[[Scene], Install]:
        return lambda scene: at_step(step, lambda _: limit_files(max(scene.weight // 8, 1 << 16)))

    return [
        Injection("full disk", "no room for the first checkpoint", refused, **small(0.5), needs_mounts=True),
        Injection("full disk", "no room for the second checkpoint", refused, **small(1.5), kept=2, needs_mounts=True,
                  quick=True),
        Injection("full disk", "no room for the second checkpoint, two ranks", refused, **small(1.5), kept=2,
                  needs_mounts=True, ranks=2),
        Injection("full disk", "no room for the last checkpoint", refused, **small(2.5), kept=4, needs_mounts=True),
        Injection("full disk", "no room in the run folder, from the start", Expected(WRITING, "No space left", "again"),
                  before=lambda scene: scene.mounts.small(scene.run, 16 << 10),
                  after=lambda scene: scene.mounts.grow(scene.run, LARGE), needs_mounts=True),
        Injection("full disk", "no room in the store, while prepare writes",
                  Expected(WRITING, "could not be written: No space left.*MB are free there", "again"),
                  before=lambda scene: scene.mounts.small(scene.store, 1 << 20),
                  after=lambda scene: scene.mounts.grow(scene.store, LARGE), needs_mounts=True, verb="prepare"),
        Injection("full disk", "no large file may be written (limit of the system), from step 0 on", refused,
                  inject=no_large_file(0)),
        Injection("full disk", "no large file may be written (limit of the system), from step 4 on", refused,
                  inject=no_large_file(4), kept=2),
    ]  # fmt: skip


def _file_instead(scene: Scene) -> None:
    scene.run.mkdir()
    (scene.run / "ckpt").write_text("no folder\n")


def read_only() -> list[Injection]:
    def closed(words: str, folder: Callable[[Scene], Path]) -> dict[str, Any]:
        return {"expected": Expected(WRITING, words, "again"), "needs_mounts": True,
                "before": lambda scene: scene.mounts.read_only(folder(scene)),
                "after": lambda scene: scene.mounts.writable(folder(scene))}  # fmt: skip

    def close_at(step: int) -> Callable[[Scene], Install]:
        return lambda scene: at_step(step, lambda _: scene.mounts.read_only(scene.run / "ckpt"))

    fault, refused = "read-only checkpoint folder", "could not be written.*Read-only file system"
    return [
        Injection(fault, "from the start", **closed(refused, lambda scene: scene.run / "ckpt"), quick=True),
        Injection(fault, "from the resume after 4 steps on", **closed(refused, lambda scene: scene.run / "ckpt"),
                  begin=4, kept=4),
        Injection(fault, "from step 4 on", Expected(WRITING, refused, "again"), inject=close_at(4), needs_mounts=True,
                  before=lambda scene: scene.mounts, kept=2,
                  after=lambda scene: scene.mounts.writable(scene.run / "ckpt")),
        Injection("read-only run folder", "from the start", **closed("Read-only file system", lambda scene: scene.run)),
        Injection(fault, "a file has its place",
                  Expected(WRITING, "could not be written.*(File exists|Not a directory)", "again"),
                  before=_file_instead, after=lambda scene: (scene.run / "ckpt").unlink()),
    ]  # fmt: skip


def slow() -> list[Injection]:
    return [
        Injection("slow disk", "every file of the store comes 0.1 s late", Expected(),
                  inject=lambda _: at_file("/volumes/", delay(0.1), again=True)),
        Injection("slow disk", "every file of a checkpoint comes 0.1 s late", Expected(), quick=True,
                  inject=lambda _: at_file("/ckpt/", delay(0.1), again=True)),
    ]  # fmt: skip
