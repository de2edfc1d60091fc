"""The DeepSpeed engine around the student. The teacher stays outside: ZeRO's tools lose it and casts freeze it."""

from __future__ import annotations

import copy
import difflib
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from medfast.training import optim as optimisation
from medfast.training import zero
from medfast.training.distributed import World
from medfast.training.ema import averaging
from medfast.training.settings import Optim, Train
from medfast.types import Batch, Objective, Output

__all__ = ["Engine", "check"]

STAGES = (0, 1, 2, 3)
_OURS = {  # keys of DeepSpeed's own that would do what our sections do, and where to say it
    "optimizer": "optim", "scheduler": "optim", "gradient_clipping": "optim.clip", "train_batch_size": "train.batch",
    "train_micro_batch_size_per_gpu": "train.micro", "gradient_accumulation_steps": "train.micro",
    "managed_gradient_accumulation": "train.micro", "activation_checkpointing": "objective.backbone.checkpoint",
    "zero_force_ds_cpu_optimizer": "zero_optimization.offload_optimizer",
}  # fmt: skip
# Top-level keys that DeepSpeed 0.19 reads (runtime/config.py) and that are not ours; it ignores all others.
_THEIRS = frozenset({
    "aio", "autotuning", "bf16", "checkpoint", "comet", "comms_logger",
    "communication_data_type", "compile", "csv_monitor", "data_efficiency", "data_types", "dataloader_drop_last",
    "datastates_ckpt", "disable_allgather", "disable_python_gc", "dump_state", "expert_parallel", "flops_profiler",
    "fp16", "gradient_allreduce_op", "gradient_predivide_factor", "hybrid_engine", "log_level", "memory_breakdown",
    "pipeline", "prescale_gradients", "seq_parallel_communication_data_type", "steps_per_print", "tensor_parallel",
    "tensorboard", "timers", "torch_autocast", "use_data_before_expert_parallelism", "wall_clock_breakdown",
    "wandb", "weight_quantization", "zero_allow_untested_optimizer", "zero_optimization",
})  # fmt: skip
# Keys of zero_optimization that put parameters or moments where a checkpoint would not find them, or round them.
_ELSEWHERE = (
    "offload_param", "zero_hpz_partition_size", "zero_quantized_weights", "zero_quantized_nontrainable_weights",
    "zero_quantized_gradients", "zenflow", "mics_shard_size", "legacy_stage1", "elastic_checkpoint",
)  # fmt: skip
_SECTIONS = ("bf16", "fp16", "torch_autocast", "zero_optimization")  # those read below


def check(section: Mapping[str, Any] | None, optim: Optim, train: Train) -> int:
    """ZeRO's stage of a deepspeed section, 0 where DeepSpeed does not run; ValueError for what cannot be run."""
    section = {} if section is None else section
    _known(section)
    for key, ours in _OURS.items():
        if key in section:
            raise ValueError(f"deepspeed.{key}: leave it out, {ours} decides that for every strategy")
    if train.strategy != "deepspeed":
        return 0
    for key in ("bf16", "fp16"):
        if (section.get(key) or {}).get("enabled"):
            raise ValueError(
                f"deepspeed.{key}.enabled stores parameters in 16 bits, and the teacher would average rounded weights; "
                "write train.precision=bf16, which computes in bf16 over fp32 parameters (torch_autocast)"
            )
    if "torch_autocast" in section and bool(section["torch_autocast"].get("enabled")) != (train.precision == "bf16"):
        raise ValueError(f"deepspeed.torch_autocast and train.precision={train.precision} contradict each other")
    stage = _zero(section.get("zero_optimization") or {})
    if stage == 3 and train.compile:
        raise ValueError(
            "train.compile=true: ZeRO stage 3 fetches weights layer by layer, in hooks that a compiled graph leaves "
            "out; use deepspeed.zero_optimization.stage 0, 1 or 2, or train.compile=false"
        )
    return stage


def _zero(section: Mapping[str, Any]) -> int:
    """The stage of zero_optimization; ValueError for what is not known to train and resume exactly."""
    stage = section.get("stage", 0)
    if isinstance(stage, bool) or stage not in STAGES:
        raise ValueError(f"deepspeed.zero_optimization.stage is one of {', '.join(map(str, STAGES))}, got {stage!r}")
    for key in _ELSEWHERE:
        if section.get(key):
            raise ValueError(
                f"deepspeed.zero_optimization.{key}: leave it out, parameters and moments would lie where checkpoints "
                "do not find them, or be rounded; of the offloads there is offload_optimizer: {device: cpu}"
            )
    offload = section.get("offload_optimizer")
    if offload is not None and (offload.get("device") != "cpu" or offload.get("ratio", 1.0) != 1.0):
        raise ValueError(
            f"deepspeed.zero_optimization.offload_optimizer is {{device: cpu}} of the whole state, got {dict(offload)}"
        )
    if offload is not None and not stage:
        raise ValueError("deepspeed.zero_optimization.offload_optimizer needs stage 1, 2 or 3: stage 0 ignores it")
    return stage


def _known(section: Mapping[str, Any]) -> None:
    """ValueError for a key that DeepSpeed would silently ignore, and for a value where it has a section."""
    if not isinstance(section, Mapping):
        raise ValueError(f"deepspeed must be a section of key: value lines, as in DeepSpeed's JSON, got {section!r}")
    for key in section:
        if key not in _THEIRS and key not in _OURS:
            close = difflib.get_close_matches(str(key), sorted(_THEIRS), n=1, cutoff=0.5)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ValueError(f"unknown key deepspeed.{key}{hint}. There are: {', '.join(sorted(_THEIRS))}")
    for key in _SECTIONS:
        if not isinstance(section.get(key, {}), Mapping):
            raise ValueError(f"deepspeed.{key} must be a section of key: value lines, got {section[key]!r}")


def _engine(objective: Objective, optimizer: torch.optim.Optimizer, config: dict[str, Any], world: World) -> Any:
    if world.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("LOCAL_RANK", "0")
    import deepspeed

    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # gloo does our collectives; DeepSpeed would compile a shared-memory all-reduce of its own for 30 s at first launch
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    return deepspeed.initialize(model=objective, optimizer=optimizer, config=config)[0]


class Engine:
    """``Strategy`` through DeepSpeed: any ZeRO stage over a client AdamW."""

    def __init__(
        self, objective: Objective, optim: Optim, train: Train, world: World, accumulate: int, section: Mapping | None
    ):
        self.stage, self.optim, self.world, self.accumulate = check(section, optim, train), optim, world, accumulate
        self.objective, self.seen = objective, 0
        self.parameters = {name: p for name, p in objective.named_parameters() if p.requires_grad}
        self.rules = optimisation.groups(self.parameters, optim)
        self.twin = _twin(objective) if self.stage == 3 else None
        before = [world.piece(p.contiguous()).clone() for p in objective.parameters()]
        config = _config(section, train, world, accumulate)
        engine = _engine(objective, optimisation.adamw(self.parameters, self.rules, optim), config, world)
        self.engine, self.shards = engine, zero.of_stage(self.stage, engine, self.parameters, self.rules, world)
        after = [self.shards.piece(p).to(b.device) for b, p in zip(before, objective.parameters(), strict=True)]
        if not all(map(torch.equal, before, after)):
            raise RuntimeError("DeepSpeed changed parameters when it was set up; this version cannot resume exactly")
        self.average = averaging(objective, train, world, self.shards.piece, self.stage == 3)

    def forward(self, batch: Batch, t: Tensor) -> Output:
        self.engine.set_gradient_accumulation_boundary(self.seen + 1 == self.accumulate)
        return self.engine(batch, t)

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)
        self.seen += 1

    def step(self, lr: float, decay: float, t: float) -> Tensor:
        self.seen = 0
        optimisation.set_rates(self.shards.adamw.param_groups, self.rules, lr, decay, t)
        norm = optimisation.clip(self.shards.gradients(), self.optim.clip, self.world.total if self.stage else None)
        if self.stage or norm.isfinite():
            self.engine.step()
            if not self.engine.was_step_applied():  # DeepSpeed's own norm overflows where ours is still finite
                norm = torch.full_like(norm, torch.inf)
        self.shards.forget()
        return norm

    def teach(self, momentum: float) -> None:
        if self.average is not None:
            self.average.update(momentum)

    def contents(self) -> dict[str, dict[str, Tensor]]:
        student = {}
        for name, x in self.shards.whole(dict(self.objective.named_parameters())):
            if self.world.first:
                student[name] = x.cpu() if self.stage == 3 else x
        teacher = {} if self.average is None else self.average.state()
        return {"student": student, "teacher": teacher, "optimizer": self.shards.moments()}

    def load_moments(self, moments: Mapping[str, Tensor]) -> None:
        self.shards.load_moments(moments)

    def close(self) -> None:
        self.engine.destroy()
        if self.stage:
            _release(self.objective)

    @contextmanager
    def whole(self) -> Iterator[Objective]:
        if self.twin is None:
            yield self.objective
            return
        for own, shared in zip(self.twin.modules(), self.objective.modules(), strict=True):
            own._buffers.update(shared._buffers)
        places = dict(self.twin.named_parameters())
        for name, x in self.shards.whole(dict(self.objective.named_parameters())):
            places[name].data = x
        try:
            yield self.twin
        finally:
            for p in places.values():
                p.data = p.data.new_empty(0)


def _config(section: Mapping | None, train: Train, world: World, accumulate: int) -> dict[str, Any]:
    """What DeepSpeed is given: the section, and what ours say."""
    config = copy.deepcopy(dict(section or {})) | {
        "train_batch_size": train.batch,
        "train_micro_batch_size_per_gpu": train.batch // world.size // accumulate,
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": 0.0,  # its default is a norm of 1, beside whatever we have clipped
        "zero_force_ds_cpu_optimizer": False,  # its AdamW for offloaded state is another one, compiled at first launch
    }
    if train.precision == "bf16":
        # nothing is sent in 16 bits: gradients are averaged in fp32 at every stage, as they are at stage 0
        given = config.get("torch_autocast") or {}
        config["torch_autocast"] = {
            "enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": [], **given
        }  # fmt: skip
    config.setdefault("steps_per_print", 1 << 60)
    return config


def _release(objective: Objective) -> None:
    """Put new parameters of the whole shapes, values undefined, where DeepSpeed has cut, flattened and marked them."""
    new: dict[Any, nn.Parameter] = {}
    for p in objective.parameters():
        new[p] = nn.Parameter(p.detach().new_empty(getattr(p, "ds_shape", p.shape)), p.requires_grad)
    for module in objective.modules():
        module._parameters = {name: p if p is None else new[p] for name, p in module._parameters.items()}


def _twin(objective: Objective) -> Objective:
    """The objective over again, its parameters empty, its buffers and teacher shared: what is evaluated while ZeRO-3
    has cut the parameters of the objective itself."""
    shared: list[Any] = [*objective.buffers(), objective.teacher]
    memo: dict[int, Any] = {id(x): x for x in shared}
    memo |= {id(p): nn.Parameter(p.detach().new_empty(0), p.requires_grad) for p in objective.parameters()}
    return copy.deepcopy(objective, memo)
