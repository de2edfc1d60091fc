"""Where DeepSpeed keeps gradients, parameters and moments at each ZeRO stage; what reaches into it is here alone.

Stage 0 holds everything whole. Stages 1 and 2 cut the parameters of a group, laid end to end, into one fragment a rank;
parameters stay whole, gradients and moments do not. Stage 3 cuts every parameter itself, as ``World.piece`` does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from medfast.training.distributed import World
from medfast.training.optim import Group
from medfast.training.strategies import read_moments, write_moments

__all__ = ["Shards", "of_stage"]

KINDS = ("exp_avg", "exp_avg_sq")


class Shards(Protocol):
    """What of the student is where. All of it is collective where it is not whole."""

    @property
    def adamw(self) -> torch.optim.Optimizer: ...

    def gradients(self) -> list[Tensor]:
        """This rank's part of each parameter's reduced gradient, to be scaled in place; empty where it has none."""
        ...

    def piece(self, parameter: nn.Parameter) -> Tensor:
        """``World.piece`` of a parameter."""
        ...

    def whole(self, names: Mapping[str, nn.Parameter]) -> Iterator[tuple[str, Tensor]]:
        """Every parameter, whole, by name; one at a time, for the sake of memory."""
        ...

    def moments(self) -> dict[str, Tensor]:
        """``Strategy.contents()["optimizer"]``, complete on rank 0."""
        ...

    def load_moments(self, moments: Mapping[str, Tensor]) -> None: ...

    def forget(self) -> None:
        """Nothing of this step's gradients may reach the next one."""
        ...


def of_stage(
    stage: int, engine: Any, parameters: Mapping[str, nn.Parameter], rules: list[Group], here: World
) -> Shards:
    """The shards of a DeepSpeed engine. parameters: those that are trained, by name; rules: their groups."""
    kind = (_Whole, _Fragments, _Fragments, _Partitions)[stage]
    return kind(engine.optimizer, parameters, rules, here)


class _Whole:
    """Stage 0: DeepSpeed's optimizer is AdamW itself."""

    def __init__(self, optimizer: Any, parameters: Mapping[str, nn.Parameter], rules: list[Group], here: World):
        self.optimizer, self.parameters, self.rules, self.here = optimizer, parameters, rules, here

    @property
    def adamw(self) -> torch.optim.Optimizer:
        return self.optimizer

    def gradients(self) -> list[Tensor]:
        for p in self.parameters.values():
            if p.grad is None:  # idle: the other stages decay it and average zeros, and so do checkpoints agree
                p.grad = torch.zeros_like(p)
        return [p.grad for p in self.parameters.values() if p.grad is not None]

    def piece(self, parameter: nn.Parameter) -> Tensor:
        return self.here.piece(parameter)

    def whole(self, names: Mapping[str, nn.Parameter]) -> Iterator[tuple[str, Tensor]]:
        yield from ((name, p.detach()) for name, p in names.items())

    def moments(self) -> dict[str, Tensor]:
        return read_moments(self.adamw, self.parameters)

    def load_moments(self, moments: Mapping[str, Tensor]) -> None:
        write_moments(self.adamw, self.parameters, moments)

    def forget(self) -> None:
        for p in self.parameters.values():
            p.grad = None


class _Fragments(_Whole):
    """Stages 1 and 2: AdamW holds one flat tensor per group, this rank's fragment of it."""

    @property
    def adamw(self) -> torch.optim.Optimizer:
        return self.optimizer.optimizer

    def gradients(self) -> list[Tensor]:
        empty = self._flat()[0].new_empty(0)
        placed: list[Any] = list(self.parameters.values())  # what DeepSpeed hangs on a parameter has no type
        mapped = [(p, p._hp_mapping) for p in placed]
        return [empty if at is None else at.get_lp_grad_fragment(p._index_in_param_group) for p, at in mapped]

    def moments(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_optimizer_state

        self._link()
        found: dict[str, Tensor] = {}
        for rule, flat in zip(self.rules, self._flat(), strict=True):
            for name in rule.names:
                for kind in KINDS:
                    moment = safe_get_full_optimizer_state(self.parameters[name], kind)
                    assert moment is not None, f"DeepSpeed keeps no {kind} of {name}"
                    if self.here.first:
                        found[f"{kind}/{name}"] = moment.cpu()
                found[f"step/{name}"] = self.adamw.state[flat]["step"].clone()
        return found

    def load_moments(self, moments: Mapping[str, Tensor]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        for rule, flat in zip(self.rules, self._flat(), strict=True):
            _begin(self.adamw, flat, moments[f"step/{rule.names[0]}"])
        self._link()
        for name, p in self.parameters.items():
            for kind in KINDS:
                safe_set_full_optimizer_state(p, moments[f"{kind}/{name}"].to(p.device), kind)

    def forget(self) -> None:
        """DeepSpeed has, but for offloaded gradients, which it overwrites where a parameter takes part in a step."""
        added_up = getattr(self.optimizer, "accumulated_grads_in_cpu", {})  # there where offloaded
        for x in (*(flat.grad for flat in self._flat()), *added_up.values()):
            if x is not None:
                x.zero_()

    def _link(self) -> None:
        """Tell every parameter where its moments are. DeepSpeed (0.19) does so once, after the step of the first group,
        when the others have none yet; its getters then find nothing."""
        self.optimizer._hp_optimizer_states_linked = False
        self.optimizer._lazy_init_hp_params_optimizer_state()

    def _flat(self) -> list[Tensor]:
        """This rank's fragment of each parameter group in fp32."""
        return [group["params"][0] for group in self.adamw.param_groups]


class _Partitions(_Whole):
    """Stage 3: AdamW is handed one flat tensor after the other, the pieces of some parameters laid end to end."""

    def __init__(self, optimizer: Any, parameters: Mapping[str, nn.Parameter], rules: list[Group], here: World):
        super().__init__(optimizer, parameters, rules, here)
        self._keep()

    @property
    def adamw(self) -> torch.optim.Optimizer:
        return self.optimizer.optimizer

    def gradients(self) -> list[Tensor]:
        found = []
        for p in self.parameters.values():
            gradient, _ = self.optimizer._get_fp32_grad_state_partition(p, release_swap_buffers=True)
            found.append(self._cut(p, gradient))
        return found

    def piece(self, parameter: nn.Parameter) -> Tensor:
        return self._cut(parameter, parameter.ds_tensor.detach())  # type: ignore[attr-defined]

    def whole(self, names: Mapping[str, nn.Parameter]) -> Iterator[tuple[str, Tensor]]:
        for name, p in names.items():
            yield name, self._united(p, self.piece(p))

    def moments(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_local_optimizer_state

        found: dict[str, Tensor] = {}
        for flat, members in self._flat():
            for name in members:
                for kind in KINDS:
                    p = self.parameters[name]
                    moment = self._united(p, self._cut(p, safe_get_local_optimizer_state(p, kind)))
                    if self.here.first:
                        found[f"{kind}/{name}"] = moment.cpu()
                found[f"step/{name}"] = self.adamw.state[flat]["step"].clone()
        return found

    def load_moments(self, moments: Mapping[str, Tensor]) -> None:
        from deepspeed.utils import safe_set_local_optimizer_state

        for flat, members in self._flat():
            _begin(self.adamw, flat, moments[f"step/{members[0]}"])
            for name in members:
                p = self.parameters[name]
                for kind in KINDS:
                    piece = self.here.piece(moments[f"{kind}/{name}"])
                    padded = piece.new_zeros(p.ds_tensor.numel())  # type: ignore[attr-defined]
                    padded[: piece.numel()] = piece
                    safe_set_local_optimizer_state(p, padded, kind)

    def forget(self) -> None:
        """DeepSpeed overwrites the gradients of parameters that took part in a step. One that did not would be moved
        by those of the last step in which it did. And the step has freed what is kept."""
        self.optimizer.grad_partitions_flat_buffer.zero_()
        for flat, _ in self._flat():
            if flat.grad is not None:  # offloaded
                flat.grad.zero_()
        self._keep()

    def _keep(self) -> None:
        """Until the step, let no parameter of a composite module be freed: DeepSpeed fetches parameters for the
        backward pass where it finds tensors in what their module returned, and ours return dataclasses, in which it
        does not look."""
        for p in _of_composites(self.optimizer.module):
            p.ds_active_sub_modules.add("kept")

    def _flat(self) -> list[tuple[Tensor, list[str]]]:
        """The tensors AdamW is handed, with the names of what is in them."""
        names = {id(p): name for name, p in self.parameters.items()}
        members = [[names[id(p)] for p in group] for group in self.optimizer.fp16_groups]
        return list(zip(self.optimizer.fp32_partitioned_groups_flat, members, strict=True))

    def _cut(self, parameter: Any, padded: Tensor) -> Tensor:
        begin, end = self.here.bounds(parameter.ds_numel)
        return padded.view(-1)[: end - begin]

    def _united(self, parameter: Any, piece: Tensor) -> Tensor:
        piece = piece.to(self.here.device)
        return self.here.unite([piece], [parameter.ds_numel])[0].view(parameter.ds_shape)


def _of_composites(module: nn.Module) -> list[Any]:
    """Parameters of modules that have modules of their own: positions, mask tokens, bias tables."""
    composites = [m for m in module.modules() if next(m.children(), None) is not None]
    return [p for m in composites for p in m.parameters(recurse=False)]


def _begin(adamw: torch.optim.Optimizer, flat: Tensor, step: Tensor) -> None:
    """State of a flat tensor as if AdamW had taken ``step`` steps, its moments still to be filled."""
    adamw.state[flat] = {
        "step": step.clone(), "exp_avg": torch.zeros_like(flat), "exp_avg_sq": torch.zeros_like(flat)
    }  # fmt: skip
