"""Numbers that are none, and clocks that jump."""

from __future__ import annotations

import os

from medfast.drill.judge import Expected
from medfast.drill.moments import at_step, clock, inf_voxel, nan_gradient
from medfast.drill.scene import Injection, Scene

__all__ = ["clocks", "not_finite"]

YEARS_S = 10 * 365.25 * 86400


def not_finite() -> list[Injection]:
    def skipped(step: int) -> Expected:
        return Expected((0,), f"step {step} is skipped", "skipped")

    return [
        *(Injection("NaN gradient", f"step {step}", skipped(step), quick=step == 3,
                    inject=lambda _, step=step: at_step(step, nan_gradient)) for step in (1, 3, 5)),
        *(Injection("Inf voxel", f"step {step}, in a view", skipped(step), inject=lambda _, step=step: inf_voxel(step),
                    quick=step == 2) for step in (0, 2, 4)),
        Injection("NaN gradient", "step 3, no skip is allowed", Expected((4,), "train.skip_budget=0", "again"),
                  inject=lambda _: at_step(3, nan_gradient), settings=("train.skip_budget=0",)),
        Injection("Inf voxel", "step 4, in a view, no skip is allowed", Expected((4,), "train.skip_budget=0", "again"),
                  inject=lambda _: inf_voxel(4), settings=("train.skip_budget=0",), kept=2),
    ]  # fmt: skip


def _stamp(scene: Scene) -> None:
    """The older a checkpoint, the later its files claim to have been changed, the first in 2040."""
    for age, folder in enumerate(sorted((scene.run / "ckpt").glob("step_*"), reverse=True)):
        for path in (*folder.iterdir(), folder):
            os.utime(path, (2.2e9 + age * YEARS_S, 2.2e9 + age * YEARS_S))


def clocks() -> list[Injection]:
    return [
        Injection("clock jump", "ten years ahead, step 3", Expected(), inject=lambda _: at_step(3, clock(YEARS_S)),
                  quick=True),
        Injection("clock jump", "ten years back, step 3", Expected(), inject=lambda _: at_step(3, clock(-YEARS_S))),
        Injection("clock jump", "older checkpoints look newer, before the resume", Expected(), before=_stamp, begin=4),
    ]  # fmt: skip
