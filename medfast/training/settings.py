"""The sections ``train`` and ``optim`` of a configuration: their fields are the keys, their defaults the defaults."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from medfast.training.alarms import Alarms

__all__ = ["Optim", "Train"]

STRATEGIES = ("deepspeed", "ddp")
PRECISIONS = ("fp32", "bf16", "fp64")
MATMULS = ("highest", "high", "medium")
RESUMES = ("auto", "never", "must")
CLIPS = ("global", "per_parameter")
TEACHERS = ("auto", "replicated", "sharded")


def _above_zero(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0


@dataclass(frozen=True)
class Optim:
    """AdamW and its schedules, all of t = step / steps.

    lr: peak rate. min_lr: rate at the end of the cosine. warmup: share of steps in which the rate rises from 0 to lr,
    as in the papers: step 0 has rate 0 and moves no parameter, as AdamW's decay is multiplied by the rate as well.
    weight_decay: [start, end] of a cosine; biases and other one-dimensional parameters have none. betas: of AdamW.
    clip: {kind: global | per_parameter, max: L2 norm} of the reduced gradients, or None. frozen: {pattern of parameter
    names, as in a shell: share of steps in which they stand still}. lr_scale: {pattern: factor of lr for the parameters
    it matches; where several match, the last one}. Raises ValueError.
    """

    lr: float = 8e-4
    min_lr: float = 1e-6
    warmup: float = 0.1
    weight_decay: Sequence[float] = (0.04, 0.4)
    betas: Sequence[float] = (0.9, 0.999)
    clip: Mapping[str, object] | None = None
    frozen: Mapping[str, float] | None = field(default=None)
    lr_scale: Mapping[str, float] | None = field(default=None)

    def __post_init__(self):
        if not 0 <= self.min_lr <= self.lr:
            raise ValueError(f"optim needs 0 <= min_lr <= lr, got min_lr={self.min_lr} and lr={self.lr}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"optim.warmup is a share of the steps, in [0, 1), got {self.warmup}")
        for name in ("weight_decay", "betas"):
            if not isinstance(getattr(self, name), (list, tuple)) or len(getattr(self, name)) != 2:
                raise ValueError(f"optim.{name} is a list of two numbers, got {getattr(self, name)!r}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optim.betas are two numbers in [0, 1), got {list(self.betas)}")
        if self.clip is not None and (
            set(self.clip) != {"kind", "max"} or self.clip["kind"] not in CLIPS or not _above_zero(self.clip["max"])
        ):
            raise ValueError(f"optim.clip is {{kind: {' | '.join(CLIPS)}, max: a norm above 0}}, got {dict(self.clip)}")
        for pattern, share in (self.frozen or {}).items():
            if not 0 <= share <= 1:
                raise ValueError(f"optim.frozen[{pattern!r}] is a share of the steps, in [0, 1], got {share}")
        for pattern, factor in (self.lr_scale or {}).items():
            if not _above_zero(factor):
                raise ValueError(
                    f"optim.lr_scale[{pattern!r}] is a factor above 0, got {factor!r}; a layer that is to stand still "
                    "belongs into optim.frozen"
                )


@dataclass(frozen=True)
class Train:
    """How a run is executed.

    strategy: "deepspeed", or "ddp", a plain all-reduce of gradients. steps: optimizer steps of the whole run. batch:
    samples of a step over all ranks. micro: the most samples of one forward on one rank, None for all of the rank's
    share; how many they are, and how many micro-batches are accumulated, follows from the ranks. seed: of
    initialisation and of everything drawn. precision: "fp32"; "bf16", autocast over fp32 parameters; "fp64" (ddp only).
    matmul: how fp32 matrices are multiplied, as in torch.set_float32_matmul_precision: "highest" in fp32; "high" in
    TF32 on GPUs that have it; "medium" in bf16, summed in fp32, on CPUs that multiply it natively.
    teacher: its fp32 average "replicated" on every rank; "sharded", a piece on each beside a replica in the precision
    of the run; "auto", sharded from 100 million parameters on where that saves memory (several ranks, bf16). compile:
    run the objective through torch.compile. validate_every, checkpoint_every: steps between two, 0 for the end only.
    validate_crops: held-out samples, 0 for no validation. keep_last: checkpoints kept; beside them
    stay those of every keep_every-th step, 0 for none. resume: "auto" continues what the run folder holds, "never"
    wants an empty one, "must" refuses to start anew. resume_changed: continue although settings that change results
    differ from the checkpoint's. watchdog_s: seconds without progress after which a hung or missing rank is named and
    the job ends, 0 for never. skip_budget: of any 100 steps on end, so many may be skipped because a loss or gradient
    is not finite. alarms: {name: the most severe of none, warn, checkpoint, rollback, stop that it may ask for}, warn
    where it is not named. rollbacks: how often a run may roll back. Raises ValueError.
    """

    strategy: str = "deepspeed"
    steps: int = 1000
    batch: int = 8
    micro: int | None = None
    seed: int = 0
    precision: str = "fp32"
    matmul: str = "highest"
    teacher: str = "auto"
    compile: bool = False
    validate_every: int = 500
    validate_crops: int = 8
    checkpoint_every: int = 500
    keep_last: int = 3
    resume: str = "auto"
    resume_changed: bool = False
    keep_every: int = 0
    watchdog_s: float = 600.0
    skip_budget: int = 5
    alarms: Mapping[str, str] | None = None
    rollbacks: int = 3

    def __post_init__(self):
        for name, accepted in (("strategy", STRATEGIES), ("precision", PRECISIONS), ("matmul", MATMULS),
                               ("resume", RESUMES), ("teacher", TEACHERS)):  # fmt: skip
            if getattr(self, name) not in accepted:
                raise ValueError(f"train.{name} is one of {', '.join(accepted)}, got {getattr(self, name)!r}")
        for name in ("steps", "batch", "keep_last"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("validate_every", "validate_crops", "checkpoint_every", "keep_every", "watchdog_s", "skip_budget",
                     "rollbacks"):  # fmt: skip
            if getattr(self, name) < 0:
                raise ValueError(f"train.{name} must be 0 or more, got {getattr(self, name)}")
        if self.micro is not None and self.micro < 1:
            raise ValueError(f"train.micro must be at least 1, or null for a rank's whole share, got {self.micro}")
        Alarms(self.alarms)
        if self.precision == "fp64" and self.strategy != "ddp":
            raise ValueError("train.precision fp64 runs with train.strategy=ddp only: DeepSpeed has no fp64")

    def shares(self, ranks: int, group: int = 1) -> tuple[int, int]:
        """(samples of a rank, of a micro-batch): of the numbers up to ``micro`` that divide a rank's share, the largest
        with which the micro-batches of all ranks are whole groups of ``group`` samples. ValueError with the numbers
        where there is none."""
        if self.batch % ranks:
            raise ValueError(
                f"train.batch={self.batch} is the global batch and must be a multiple of the {ranks} ranks; "
                f"{self.batch // ranks * ranks or ranks} or {(self.batch // ranks + 1) * ranks} would do"
            )
        share = self.batch // ranks
        most = share if self.micro is None else min(self.micro, share)
        for micro in range(most, 0, -1):
            if share % micro == 0 and ranks * micro % group == 0:
                return share, micro
        raise ValueError(
            f"objective.group={group} consecutive samples are taken together, but {ranks} rank(s) x micro-batches of "
            f"at most {most} samples (train.batch={self.batch}, train.micro={self.micro}) are no multiple of it: "
            "change objective.group, train.batch or train.micro"
        )
