"""What one micro-batch of an objective allocates, reads and computes, found without computing anything.

The objective itself runs forward and backward on fake tensors, which have shapes and no data, under PyTorch's own
autograd; a dispatch mode sees every operator and every storage that is made and dropped. So there is no formula per
architecture to keep in step: what is saved for the backward pass, when it is freed, and what a checkpointed block
computes again are those of the code that trains.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from medfast.planning.example import example
from medfast.types import Batch, Objective

__all__ = ["Operator", "Trace", "forward_backward", "trace"]


@dataclass(frozen=True)
class Operator:
    """An operator that was called. flops: 0 where it moves memory more than it computes. bytes: read and written.
    sixteen: it multiplies 16-bit matrices."""

    name: str
    flops: int
    bytes: int
    sixteen: bool


@dataclass(frozen=True)
class Trace:
    """parameters, trained, teacher, buffers: bytes in fp32, the teacher with its buffers. activations: most bytes at a
    time of all that is neither of them nor a gradient. peak: most bytes at a time of activations and gradients
    together, where no gradient is there yet. operators: of one forward and backward pass, in order."""

    parameters: int
    trained: int
    teacher: int
    buffers: int
    activations: int
    peak: int
    operators: tuple[Operator, ...]

    @property
    def flops(self) -> int:
        return sum(operator.flops for operator in self.operators)

    @property
    def bytes(self) -> int:
        return sum(operator.bytes for operator in self.operators)


class _Recorder(TorchDispatchMode):
    """Counts storages that live and operators that run while it is on."""

    def __init__(self, known: list[Tensor]):
        super().__init__()
        self.operators: list[Operator] = []
        self.live = self.most = self.gradients = self.most_with_gradients = 0
        self._sizes: dict[Any, int] = {}  # by weak reference, so that a storage's end is seen
        self._known = {id(x.untyped_storage()): x for x in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        for x in made:
            self._add(x)
        self._count(func, args, kwargs, out, made)
        return out

    def keep(self, gradient: Tensor) -> None:
        """From now on this tensor is a gradient and no activation."""
        storage = gradient.untyped_storage()
        size = self._sizes.pop(weakref.ref(storage), None)
        if size is not None:
            self.live -= size
            self.gradients += size
            self._known[id(storage)] = gradient

    def _add(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        if id(storage) in self._known:
            return
        reference = weakref.ref(storage, self._drop)
        if reference in self._sizes:
            return
        self._sizes[reference] = storage.nbytes()
        self.live += storage.nbytes()
        self.most = max(self.most, self.live)
        self.most_with_gradients = max(self.most_with_gradients, self.live + self.gradients)

    def _drop(self, reference: Any) -> None:
        self.live -= self._sizes.pop(reference, 0)

    def _count(self, func, args, kwargs, out, made: list[Tensor]) -> None:
        if func.is_view or not made:
            return
        read = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        moved = sum(x.numel() * x.element_size() for x in (*read, *made))
        formula = flop_registry.get(func.overloadpacket)
        flops = formula(*args, **kwargs, out_val=out) if formula else _window_flops(func, args)
        self.operators.append(Operator(str(func.overloadpacket), flops, moved, made[0].element_size() == 2))


def _window_flops(func, args) -> int:
    """Of fused window attention, 0 for everything else: two products with as many rows as a window has tokens, five on
    the way back."""
    schema = func._schema
    if not schema.name.split("::")[1].startswith("window_attention"):
        return 0
    given = {argument.name: value for argument, value in zip(schema.arguments, args, strict=False)}
    products = 5 if "backward" in schema.name else 2
    return 2 * products * given["qkv"].numel() // 3 * math.prod(given["window"])


class _CudaAutocast(TorchFunctionMode):
    """CUDA's autocast computes these in fp32 where the CPU's stays in 16 bits."""

    WIDE = frozenset({
        nn.functional.layer_norm, nn.functional.group_norm, nn.functional.softmax, nn.functional.log_softmax,
        nn.functional.normalize, nn.functional.mse_loss, nn.functional.l1_loss, nn.functional.smooth_l1_loss,
        nn.functional.cosine_similarity, torch.softmax, torch.log_softmax, torch.layer_norm, torch.sum, torch.prod,
        torch.cumsum, torch.exp, torch.log, torch.pow, torch.norm, Tensor.softmax, Tensor.log_softmax, Tensor.sum,
        Tensor.exp, Tensor.log, Tensor.pow, Tensor.norm, Tensor.cumsum,
    })  # fmt: skip

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in self.WIDE:
            args = tuple(x.float() if isinstance(x, Tensor) and x.dtype == torch.bfloat16 else x for x in args)
        return func(*args, **(kwargs or {}))


def forward_backward(objective: Objective, batch: Batch, precision: str) -> None:
    """What a rank does with a micro-batch: forward pass, sum of the losses, backward pass."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
        output = objective(batch, torch.tensor(0.1, dtype=torch.float64))
    torch.stack(list(output.losses.values())).sum().backward()


def trace(
    build: Callable[[], Objective], data: Mapping[str, Any], micro: int, precision: str, ranks: int = 1,
    cuda: bool = True,
) -> Trace:  # fmt: skip
    """Trace one micro-batch of ``micro`` samples on one of ``ranks`` ranks.

    build: makes the objective; it is called with PyTorch's default device set to "meta", so it costs no memory. cuda:
    autocast by CUDA's rules rather than the CPU's. Raises what the objective raises for a batch that it cannot take.
    """
    with torch.device("meta"):
        objective = build()
    batch = example(objective, data, micro, _channels(objective))
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        objective.to_empty(device="cpu").train()
        if objective.teacher is not None:
            objective.teacher.to_empty(device="cpu")
        objective.gather = lambda rows: (torch.cat([rows] * ranks), 0)
        parameters = list(objective.parameters())
        taught = [] if objective.teacher is None else list(objective.teacher.state().values())
        known = [*parameters, *objective.buffers(), *taught]
        recorder = _Recorder(known)
        with ExitStack() as stack:
            stack.enter_context(_reclassified(parameters, recorder))
            if cuda and precision == "bf16":
                stack.enter_context(_CudaAutocast())
            stack.enter_context(recorder)
            forward_backward(objective, _fake(fake, batch), precision)
    return Trace(
        parameters=_nbytes(parameters), trained=_nbytes([p for p in parameters if p.requires_grad]),
        teacher=_nbytes(taught), buffers=_nbytes(list(objective.buffers())), activations=recorder.most,
        peak=recorder.most_with_gradients, operators=tuple(recorder.operators),
    )  # fmt: skip


@contextmanager
def _reclassified(parameters: list[nn.Parameter], recorder: _Recorder) -> Iterator[None]:
    """Gradients count as such from the moment when they are complete."""

    def keep(p: Tensor) -> None:
        assert p.grad is not None
        recorder.keep(p.grad)

    hooks = [p.register_post_accumulate_grad_hook(keep) for p in parameters if p.requires_grad]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _channels(objective: Objective) -> int:
    backbone = getattr(objective, "backbone", None)
    encoder = getattr(backbone, "encoder", backbone)
    return getattr(encoder, "in_channels", 1)


def _fake(mode: FakeTensorMode, batch: Batch) -> Batch:
    """The batch as it lies on the device; it counts as activations, because it is gone with the micro-batch."""

    def turn(x: Tensor) -> Tensor:
        return mode.from_tensor(x).clone()

    key = batch.key
    assert key.sample is not None
    return replace(
        batch, views=tuple(map(turn, batch.views)), key=key._replace(sample=turn(key.sample)),
        params={name: turn(x) for name, x in batch.params.items()},
        targets={name: tuple(map(turn, per_view)) for name, per_view in batch.targets.items()},
    )  # fmt: skip


def _nbytes(tensors: Sequence[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)
