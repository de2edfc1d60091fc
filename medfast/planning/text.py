"""A plan as it is read."""

from __future__ import annotations

from medfast.planning.plan import ASSUMPTIONS, Plan, Row

__all__ = ["describe"]

GB = 1e9
WIDTHS = 13, 11, 11, 9, 9, 13, 8


def describe(plan: Plan, name: str, volumes: int | None) -> str:
    """The whole page. name: of the configuration; volumes: of the store, for epochs."""
    parts = [_head(plan, name, volumes), _memory(plan), _time(plan), advice(plan)]
    parts.append("\n".join(["assumed:", *(f"  - {line}" for line in ASSUMPTIONS)]))
    return "\n\n".join(parts)


def _head(plan: Plan, name: str, volumes: int | None) -> str:
    train, place, seen = plan.train, plan.place, plan.seen
    nodes = "one node" if place.nodes == 1 else f"{place.nodes} nodes, {place.network * 8 / GB:.0f} Gb/s each"
    lines = [
        f"{name} on {place.ranks} x {place.name} ({nodes}), {train.precision}",
        f"{seen.trained // 4:,} parameters are trained, {seen.teacher // 4:,} numbers are in the teacher",
        f"batch {train.batch} = {place.ranks} rank(s) x {plan.micro_batches} micro-batch(es) of "
        f"{train.batch // place.ranks // plan.micro_batches}",
    ]
    if volumes:
        epochs = train.steps * train.batch / volumes
        lines.append(f"{train.steps:,} steps are {epochs:,.1f} epochs of {volumes:,} volumes")
    return "\n".join(lines)


def _memory(plan: Plan) -> str:
    lines = ["GB of a GPU   parameters  gradients  optimizer  teacher  buckets  activations    peak"]
    for row in plan.rows:
        held = row.held
        sizes = (held.parameters, held.gradients, held.optimizer, held.teacher, held.buckets)
        sizes += (plan.seen.activations, row.peak)
        cells = "".join(f"{size / GB:>{width}.2f}" for size, width in zip(sizes, WIDTHS, strict=True))
        lines.append(f"ZeRO {row.stage}    {cells}{'' if row.fits else '   does not fit'}")
    return "\n".join(lines)


def _time(plan: Plan) -> str:
    lines = ["s of a step   compute  (waits for Python)  update     EMA    wires   total    volumes/s    days"]
    for row in plan.rows:
        took = row.seconds
        days = plan.train.steps * took.total / 86_400
        lines.append(
            f"ZeRO {row.stage}    {took.compute:>11.3f}{took.hosted:>20.3f}{took.update:>8.4f}{took.average:>8.4f}"
            f"{took.wire:>9.4f}{took.total:>8.3f}{plan.train.batch / took.total:>13.1f}{days:>8.2f}"
        )
    return "\n".join(lines)


def advice(plan: Plan) -> str:
    """Which stage, and what to change where none fits."""
    best = plan.advised
    if best is None:
        return (
            "advice: no stage fits, even with micro-batches of "
            f"{plan.train.batch // plan.place.ranks // plan.micro_batches}. Set objective.backbone.checkpoint=true "
            "(activations are computed again), or take smaller views (data.size) or a larger GPU"
        )
    own = plan.rows[plan.stage]
    sentence = f"advice: deepspeed.zero_optimization.stage={best.stage}, {_why(plan, best)}"
    if own.stage != best.stage:
        longer = own.seconds.total / best.seconds.total - 1
        sentence += f". The configuration says {own.stage}: " + (
            f"{longer:+.1%} time, {(own.peak - best.peak) / GB:+.2f} GB" if own.fits else "it does not fit"
        )
    return sentence + f"; train.micro={plan.micro}"


def _why(plan: Plan, best: Row) -> str:
    if best.stage == 0:
        least = min(plan.rows, key=lambda row: row.peak)
        saved = plan.rows[0].peak - least.peak
        kept = "sharding would save nothing" if saved <= 0 else f"stage {least.stage} would save {saved / GB:.2f} GB"
        return f"because everything fits and nothing is faster by more than estimates tell; {kept}"
    return "the lowest that fits and is as fast as any that does"
