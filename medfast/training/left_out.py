"""Damaged volumes that ``data.skip`` let the run leave out, counted over all ranks."""

from __future__ import annotations

import json

from medfast.training.job import Job

__all__ = ["LeftOut"]

_NAMED = 10  # of a sentence


class LeftOut:
    """Keeps ``job.damaged``, ids, the same on all ranks. streams: of the splits, ``medfast.data.loader.Stream``, or any
    that leave nothing out and have no ``damaged``. What one rank met, all leave out, so the budget is the run's."""

    def __init__(self, job: Job, *streams):
        self._job, self._streams = job, [stream for stream in streams if hasattr(stream, "damaged")]

    def _met(self) -> dict[str, str]:
        """id -> reason of what this rank has left out and not yet told the others."""
        damaged = {volume: reason for stream in self._streams for volume, reason in stream.damaged.items()}
        return {volume: damaged[volume] for volume in sorted(damaged) if volume not in self._job.damaged}

    @property
    def news(self) -> bool:
        """Whether this rank knows of a volume that the others may not; then all must ``unite``."""
        return bool(self._met())

    def unite(self) -> None:
        """Let all ranks leave out what any of them met, and say so. Collective. Raises DataError, on every rank, where
        that is more than data.skip allows."""
        here, mine, found = self._job.here, json.dumps(self._met()), {}
        for rank in range(here.size):
            found |= json.loads(here.share(mine, rank))
        for volume, reason in sorted(found.items()):
            self._job.damaged.add(volume)
            self._job.log.say(f"left out, number {len(self._job.damaged)}: {reason}")
            for stream in self._streams:
                stream.leave_out(volume, reason)

    def recall(self) -> None:
        """What a checkpoint says was left out is judged again before the first step: what is damaged still counts from
        there on, what was repaired is used again, and that is said. Collective."""
        before = sorted(self._job.damaged)
        if not before:
            return
        self._job.damaged.clear()
        for stream in self._streams:
            stream.judge(before)
        self.unite()
        if sound := [volume for volume in before if volume not in self._job.damaged]:
            self._job.log.say(f"{_listed(sound)} had been left out and can be read now: used again from here on")

    def say(self) -> None:
        """The last word of a run."""
        if self._job.damaged:
            self._job.log.say(f"{_listed(sorted(self._job.damaged))} left out as damaged (data.skip)")


def _listed(volumes: list[str]) -> str:
    more = f" and {len(volumes) - _NAMED} more, see meta.json of the checkpoint" if len(volumes) > _NAMED else ""
    return f"{len(volumes)} volume(s), {', '.join(volumes[:_NAMED])}{more},"
