"""A pretext task of a few thousand parameters and a stream without files, with everything that training touches."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import torch
from torch import nn

import medfast_kernels as mk
from medfast.training import checkpoint, pretrain
from medfast.types import Batch, Key, Objective, Output, Teacher

WIDTH, CELLS = 6, (2, 2, 2)


class Tiny(Objective):
    """Reconstruction of hidden cells and distillation against a centred teacher; drop path from the batch's key."""

    views = 2

    def __init__(self, broken_at: int | None = None):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, 16))
        self.recon = nn.Linear(16, WIDTH)
        self.last = nn.Linear(16, 8, bias=False)
        self.fill = nn.Parameter(torch.zeros(WIDTH))
        self.register_buffer("centre", torch.zeros(8))
        self.broken_at = broken_at
        self.teacher = Teacher(self, "backbone", "last", "fill")

    def cells(self, size):
        return CELLS

    def momentum(self, t: float) -> float:
        return 0.9 + 0.1 * t

    def absorb(self, sums) -> None:
        total, count = sums["centre"]
        self.centre.lerp_((total / count).to(self.centre), 0.1)

    def forward(self, batch: Batch, t) -> Output:
        x = torch.cat(batch.views).flatten(1).unflatten(1, (8, WIDTH))
        key = batch.key.stack(2)
        if "mask" in batch.targets:
            where = torch.cat(batch.targets["mask"]).flatten(1)
        else:
            where = torch.zeros(len(x), 8, dtype=torch.bool)
            where = where.scatter(1, mk.random_ids(8, 5, key=key.at(mk.Role.MASK)), True)
        seen = self.backbone(torch.where(where.unsqueeze(-1), self.fill.to(x), x))
        if self.training:
            keep = mk.random_keep(0.3, key=key.at(mk.Role.DROP_PATH)).to(x).reshape(-1, 1, 1)
            seen = seen * keep / 0.7
        hidden = where.to(x)
        wrong = (self.recon(seen) - x).abs().mean(-1)
        recon = ((wrong * hidden).sum(1) / hidden.sum(1)).mean()
        with torch.no_grad():
            raw = self.teacher.last(self.teacher.backbone(x)).to(x)
            target = ((raw - self.centre.to(x)) / (0.5 + t)).softmax(-1)
        distil = -(target * self.last(seen).log_softmax(-1)).sum(-1).mean()
        if self.broken_at == batch.key.step:
            distil = distil * float("nan")
        return Output(
            {"recon": recon, "distil": 0.1 * distil},
            {"hidden": hidden.mean()},
            {"centre": (raw.sum((0, 1)), torch.tensor(float(raw.shape[0] * raw.shape[1])))},
        )

    @torch.no_grad()
    def tokens(self, batch: Batch, t: float = 0.0):
        x = batch.views[0].flatten(1).unflatten(1, (8, WIDTH)).flatten(0, 1)
        return {"student": self.backbone(x), "teacher": self.teacher.backbone(x),
                "prototypes": self.teacher.last(self.teacher.backbone(x)).softmax(-1)}  # fmt: skip


class Memory:
    """Stream of ``Tiny``: views are noise of (seed, step, slot)."""

    note = None

    def __init__(self, seed: int = 0, batch: int = 4, split: int = 0, stop_at: int | None = None):
        self.seed, self.batch_size, self.split, self.stop_at = seed, batch, split, stop_at
        self.volumes, self.waited = [f"v{split}"], 0.0

    def batch(self, step, slots) -> Batch:
        if step == self.stop_at:
            signal.raise_signal(signal.SIGUSR1)
        key = Key(self.seed + 100 * self.split, step, torch.as_tensor(list(slots)))
        views = tuple(mk.random_normal((1, 8, WIDTH, 1), key=key.at(mk.Role.CROP, view=v)) + v for v in range(2))
        return Batch(views, None, key._replace(seed=self.seed))

    def run(self, schedule):
        return (self.batch(*item) for item in schedule)

    def close(self) -> None: ...


def config(out, **changes) -> dict:
    """A configuration of eight steps; ``changes`` are "section__key"."""
    found = {
        "objective": {"name": "tiny"},
        "optim": {"lr": 1e-2, "min_lr": 1e-4, "warmup": 0.25},
        "train": {"strategy": "ddp", "steps": 8, "batch": 4, "validate_every": 4, "validate_crops": 3,
                  "checkpoint_every": 4},
        "deepspeed": {}, "init": None, "out": str(out),
    }  # fmt: skip
    for name, value in changes.items():
        section, _, key = name.partition("__")
        if key:
            found[section][key] = value
        else:
            found[section] = value
    return found


def build(seed: int = 0, **options) -> Tiny:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Tiny(**options)


def run(out, seed: int = 0, stop_at: int | None = None, broken_at: int | None = None, **changes) -> Tiny:
    """Pretrain from scratch or from what ``out`` holds; the objective as it is at the end."""
    objective = build(seed, broken_at=broken_at)
    batch = changes.get("train__batch", 4)
    pretrain(objective, config(out, **changes), Memory(batch=batch, stop_at=stop_at), Memory(batch=batch, split=1))
    return objective


def rows(out) -> list[dict]:
    """The metrics of a run without its timings."""
    found = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "time"} for row in found]


def tensors(out, step: int = 8) -> dict[str, torch.Tensor]:
    """Everything in a checkpoint."""
    parts, _ = checkpoint.load(Path(out) / "ckpt" / f"step_{step:08d}")
    return {f"{part}/{name}": x for part, named in parts.items() for name, x in named.items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def everything(objective: Objective) -> bytes:
    """Student, buffers and teacher, to compare ranks."""
    state = {**objective.state_dict(), **{f"teacher.{name}": x for name, x in objective.teacher.state().items()}}
    return torch.cat([x.double().flatten() for x in state.values()]).numpy().tobytes()


def apart(a, b, step: int = 10) -> float:
    """Largest difference of the first moments of two runs, and of their gradients' norms at any step; relative.

    Losses hardly see gradients: Adam does not mind their scale, and a small rate hides their sign.
    """
    left, right = tensors(a, step), tensors(b, step)
    names = [name for name in left if name.startswith("optimizer/exp_avg/")]
    assert names
    moments = max(float((left[n] - right[n]).norm() / right[n].norm().clamp_min(1e-12)) for n in names)
    norms = max(abs(x["grad_norm"] / y["grad_norm"] - 1) for x, y in zip(rows(a), rows(b), strict=True))
    return max(moments, norms)


def drift(a: list[dict], b: list[dict]) -> float:
    """Largest relative difference of a loss between two runs."""
    pairs = [(x["loss"][name], y["loss"][name]) for x, y in zip(a, b, strict=True) for name in x["loss"]]
    return max(abs(x - y) / abs(y) for x, y in pairs)
