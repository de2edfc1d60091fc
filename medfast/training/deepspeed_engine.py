"""The DeepSpeed engine around the student. The teacher stays outside: ZeRO's tools lose it and casts freeze it."""

from __future__ import annotations

import copy
import difflib
import logging
import os
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from medfast.training import optim as optimisation
from medfast.training.distributed import World
from medfast.training.settings import Optim, Train
from medfast.training.strategies import read_moments, write_moments
from medfast.types import Batch, Objective, Output

__all__ = ["Engine", "check"]

PROVEN = (0, 1)
_OURS = {  # keys of DeepSpeed's own that would do what our sections do, and where to say it
    "optimizer": "optim", "scheduler": "optim", "gradient_clipping": "optim.clip", "train_batch_size": "train.batch",
    "train_micro_batch_size_per_gpu": "train.micro", "gradient_accumulation_steps": "train.micro",
    "managed_gradient_accumulation": "train.micro",
}  # fmt: skip
# Top-level keys that DeepSpeed 0.19 reads (runtime/config.py) and that are not ours; it ignores all others.
_THEIRS = frozenset({
    "activation_checkpointing", "aio", "autotuning", "bf16", "checkpoint", "comet", "comms_logger",
    "communication_data_type", "compile", "csv_monitor", "data_efficiency", "data_types", "dataloader_drop_last",
    "datastates_ckpt", "disable_allgather", "disable_python_gc", "dump_state", "expert_parallel", "flops_profiler",
    "fp16", "gradient_allreduce_op", "gradient_predivide_factor", "hybrid_engine", "log_level", "memory_breakdown",
    "pipeline", "prescale_gradients", "seq_parallel_communication_data_type", "steps_per_print", "tensor_parallel",
    "tensorboard", "timers", "torch_autocast", "use_data_before_expert_parallelism", "wall_clock_breakdown",
    "wandb", "weight_quantization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer",
    "zero_optimization",
})  # fmt: skip
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
    stage = (section.get("zero_optimization") or {}).get("stage", 0)
    if isinstance(stage, bool) or stage not in PROVEN:
        raise ValueError(
            f"deepspeed.zero_optimization.stage={stage}: stages 0 and 1 are shown to train and resume exactly; 2 and 3 "
            "are not yet, because their gradients and weights are sharded where clipping and the teacher read them"
        )
    if stage and optim.clip and optim.clip["kind"] == "per_parameter":
        raise ValueError(
            "optim.clip.kind=per_parameter needs every parameter's whole gradient, which ZeRO stage 1 cuts across "
            "ranks: use deepspeed.zero_optimization.stage=0, or kind: global"
        )
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
    """``Strategy`` through DeepSpeed: ZeRO stage 0 or 1 over a client AdamW."""

    def __init__(
        self, objective: Objective, optim: Optim, train: Train, world: World, accumulate: int, section: Mapping | None
    ):
        self.stage, self.optim = check(section, optim, train), optim
        self.parameters = {name: p for name, p in objective.named_parameters() if p.requires_grad}
        self.rules = optimisation.groups(self.parameters, optim)
        config = copy.deepcopy(dict(section or {}))
        config |= {
            "train_batch_size": train.batch,
            "train_micro_batch_size_per_gpu": train.batch // world.size // accumulate,
            "gradient_accumulation_steps": accumulate,
        }
        if self.stage and optim.clip:
            config["gradient_clipping"] = optim.clip["max"]
        if train.precision == "bf16":
            config.setdefault("torch_autocast", {"enabled": True, "dtype": "bfloat16"})
        config.setdefault("steps_per_print", 1 << 60)
        before = [p.detach().clone() for p in objective.parameters()]
        self.engine = _engine(objective, optimisation.adamw(self.parameters, self.rules, optim), config, world)
        after = (p.detach().to(b.device) for b, p in zip(before, objective.parameters(), strict=True))
        if not all(map(torch.equal, before, after)):
            raise RuntimeError("DeepSpeed changed parameters when it was set up; this version cannot resume exactly")

    @property
    def _adamw(self) -> torch.optim.Optimizer:
        return self.engine.optimizer.optimizer if self.stage else self.engine.optimizer

    def forward(self, batch: Batch, t: Tensor) -> Output:
        return self.engine(batch, t)

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()  # counts the micro-batch; nothing is updated

    def step(self, lr: float, decay: float, t: float) -> Tensor:
        optimisation.set_rates(self._adamw.param_groups, self.rules, lr, decay, t)
        if self.stage:
            self.engine.step()
            return torch.as_tensor(self.engine.get_global_grad_norm())
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = optimisation.clip(gradients, self.optim.clip)
        self.engine.step()
        return norm

    def moments(self) -> dict[str, Tensor]:
        if not self.stage:
            return read_moments(self._adamw, self.parameters)
        from deepspeed.utils import safe_get_full_optimizer_state

        self._link()
        found: dict[str, Tensor] = {}
        for group, flat in zip(self.rules, self._flat(), strict=True):
            for name in group.names:
                for kind in ("exp_avg", "exp_avg_sq"):
                    moment = safe_get_full_optimizer_state(self.parameters[name], kind)
                    assert moment is not None, f"DeepSpeed keeps no {kind} of {name}"
                    found[f"{kind}/{name}"] = moment
                found[f"step/{name}"] = self._adamw.state[flat]["step"].clone()
        return found

    def load_moments(self, moments: Mapping[str, Tensor]) -> None:
        if not self.stage:
            write_moments(self._adamw, self.parameters, moments)
            return
        from deepspeed.utils import safe_set_full_optimizer_state

        for group, flat in zip(self.rules, self._flat(), strict=True):
            step = moments[f"step/{group.names[0]}"].clone()
            self._adamw.state[flat] = {
                "exp_avg": torch.zeros_like(flat), "exp_avg_sq": torch.zeros_like(flat), "step": step
            }  # fmt: skip
        self._link()
        for name, p in self.parameters.items():
            for kind in ("exp_avg", "exp_avg_sq"):
                safe_set_full_optimizer_state(p, moments[f"{kind}/{name}"].to(p.device), kind)

    def _link(self) -> None:
        """Tell every parameter where its moments are. DeepSpeed (0.19) does so once, after the step of the first group,
        when the others have none yet; its getters then find nothing."""
        self.engine.optimizer._hp_optimizer_states_linked = False
        self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _flat(self) -> list[Tensor]:
        """This rank's fp32 partition of each parameter group."""
        return [group["params"][0] for group in self._adamw.param_groups]
