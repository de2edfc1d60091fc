"""Alarms of representations that die: what gauges say when a pretext task is solved without looking at the image.

Each is trouble that lasts. The first reading of it warns, a second one on end asks for a checkpoint, while there is
still something to look at, and a third one asks to stop; what they may do is up to ``train.alarms``. Limits lie where
``tests/training/test_collapse.py`` sees planted failures arrive and healthy runs, from their first step on, stay away.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from medfast.training.verdict import Verdict

__all__ = ["Lasting", "collapse", "crop_collapse", "equal_views", "idle_teacher", "position_collapse"]

LEVELS = ("warn", "checkpoint", "stop")

Reading = Mapping[str, float]
Look = Callable[[Reading, dict[str, float], Mapping[str, Any]], str | None]


class Lasting:
    """An alarm that speaks when ``look`` finds trouble in reading number ``after[i]`` on end, with action LEVELS[i].

    gauges: those it reads; a row without any of them, and a step that was skipped, is no reading. look: (this reading,
    what it remembers, which it may change, the row) -> a sentence, or None where all is well.
    """

    def __init__(self, name: str, gauges: Sequence[str], look: Look, after: tuple[int, int, int] = (1, 2, 3)):
        self.name, self.gauges, self.look, self.after = name, tuple(gauges), look, after
        self.memory: dict[str, float] = {}
        self.since, self.count = 0, 0

    def __call__(self, row: Mapping[str, Any]) -> Verdict | None:
        gauges = row.get("gauge", {})
        now = {name: gauges[name] for name in self.gauges if gauges.get(name) is not None}
        if not now or "skipped" in row:
            return None
        words = self.look(now, self.memory, row)
        if words is None:
            self.count = 0
            return None
        self.since = row["step"] if self.count == 0 else self.since
        self.count += 1
        if self.count not in self.after:
            return None
        told = f"step {row['step']}, reading {self.count} on end since step {self.since}: {words}"
        return Verdict(self.name, LEVELS[self.after.index(self.count)], told, self.since)

    def state(self) -> list:
        return [self.memory, self.since, self.count]

    def load(self, state: Any) -> None:
        self.memory, self.since, self.count = dict(state[0]), int(state[1]), int(state[2])


RANK, USED, TOLD = 1.02, 0.5, 0.02
LEAST = 16  # rows; of fewer, healthy ones are alike too often (docs/gauges.md)


def collapse() -> Lasting:
    """All answers are one: an effective rank next to 1, one prototype for all, or prototypes that no longer tell much.

    Prototypes tell nothing at first, so what they tell is held against the most they have told before. Fewer than
    ``LEAST`` rows are no evidence of anything.
    """

    def look(now: Reading, memory: dict[str, float], row: Mapping[str, Any]) -> str | None:
        if now.get("rows", 0) < LEAST:
            return None
        for part in ("student", "teacher"):
            rank = now.get(f"rank_{part}")
            if rank is not None and rank < RANK:
                return f"the {part}'s tokens have an effective rank of {rank:.4g}: they are all the same"
        if (used := now.get("entropy_used")) is not None and used < USED:
            return f"the teacher gives nearly everything one prototype: entropy_used is {used:.4g} nats"
        if (told := now.get("information")) is None:
            return None
        most = memory["information"] = max(told, memory.get("information", 0.0))
        if told < TOLD * most:
            return f"a prototype tells {told:.4g} nats of what it stands for, and told {most:.4g} before"
        return None

    return Lasting("collapse", ("rows", "rank_student", "rank_teacher", "entropy_used", "information"), look)


def crop_collapse() -> Lasting:
    """All of a crop is one: its tokens are the same, or its patches share one prototype, and crops alone differ."""

    def look(now: Reading, memory: dict[str, float], row: Mapping[str, Any]) -> str | None:
        within = now.get("variance_within")
        if within is not None and within < TOLD:
            return f"{within:.2%} of the variance of the encoder's tokens is within crops: a crop has one token"
        told, inside = now.get("information"), now.get("information_within")
        if told is None or inside is None or inside >= TOLD * told:
            return None
        return f"a prototype tells {told:.4g} nats, of which {inside:.4g} within a crop: a crop has one prototype"

    return Lasting("crop_collapse", ("variance_within", "information", "information_within"), look)


PLACE = 0.9


def position_collapse() -> Lasting:
    """Tokens that are told from each other say where they are and not what is there (SimPROT, BTROT)."""

    def look(now: Reading, memory: dict[str, float], row: Mapping[str, Any]) -> str | None:
        if now["same_position"] <= PLACE:
            return None
        return (f"tokens at one place of different volumes have a similarity of {now['same_position']:.4g}: they tell "
                "their place and not what is there")  # fmt: skip

    return Lasting("position_collapse", ("same_position",), look, after=(10, 25, 50))


def equal_views() -> Lasting:
    """The two views of most samples are the same: whatever compares them learns nothing."""

    def look(now: Reading, memory: dict[str, float], row: Mapping[str, Any]) -> str | None:
        if now["equal_views"] <= 0.5:
            return None
        return f"the views of {now['equal_views']:.0%} of the samples are equal, voxel by voxel: see the data section"

    return Lasting("equal_views", ("equal_views",), look, after=(3, 10, 30))


STILL = 1e-4  # 1 - momentum from which on an average in fp32 must move from one reading to the next


def idle_teacher() -> Lasting:
    """The teacher is what it was at the last reading, although it is an average that should follow the student."""

    def look(now: Reading, memory: dict[str, float], row: Mapping[str, Any]) -> str | None:
        before, memory["norm"] = memory.get("norm"), now["teacher_norm"]
        momentum = row.get("momentum")
        if momentum is None or 1.0 - momentum < STILL or before != now["teacher_norm"]:
            return None
        return f"the teacher has not moved since the last reading, with a momentum of {momentum:.6g}: is it updated?"

    return Lasting("idle_teacher", ("teacher_norm",), look)
