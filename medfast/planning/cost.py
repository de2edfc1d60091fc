"""How long an optimizer step takes on a GPU: every operator at the speed of what limits it, one after the other."""

from __future__ import annotations

from dataclasses import dataclass

from medfast.planning.hardware import Cluster, Gpu
from medfast.planning.trace import Trace
from medfast.planning.traffic import sent

__all__ = ["REACHED", "Seconds", "seconds"]

REACHED = {"bandwidth": 0.85, "flops": 0.5, "wire": 0.8}  # shares of the data sheet, of well-made kernels and NCCL
LAUNCH_S = 8e-6  # an operator takes no less: Python, autograd and the dispatcher have to reach it
ADAMW_PASSES = 12  # over the parameters, gradients and moments: 7 of one fused kernel, more of PyTorch's list operators


@dataclass(frozen=True)
class Seconds:
    """Of an optimizer step. compute: all micro-batches. hosted: the part of it in which operators wait for Python."""

    compute: float
    hosted: float
    update: float
    average: float
    wire: float

    @property
    def total(self) -> float:
        """Nothing overlapped."""
        return self.compute + self.update + self.average + self.wire


def seconds(seen: Trace, place: Cluster, micro_batches: int, shard: int, payload: dict[str, float]) -> Seconds:
    """An estimate, for which nothing was run. shard: ranks that share the update (1 at stage 0)."""
    bandwidth = place.gpu.bandwidth * REACHED["bandwidth"]
    device = [_device_s(operator.flops, operator.bytes, operator.sixteen, place.gpu) for operator in seen.operators]
    compute = sum(max(LAUNCH_S, x) for x in device)
    return Seconds(
        compute=micro_batches * compute, hosted=micro_batches * sum(max(0.0, LAUNCH_S - x) for x in device),
        update=ADAMW_PASSES * seen.trained / shard / bandwidth, average=3 * seen.teacher / bandwidth,
        wire=sent(payload, place.ranks) / (place.wire * REACHED["wire"]),
    )  # fmt: skip


def _device_s(flops: int, moved: int, sixteen: bool, gpu: Gpu) -> float:
    peak = (gpu.bf16 if sixteen else gpu.fp32) * REACHED["flops"]
    return max(flops / peak, moved / (gpu.bandwidth * REACHED["bandwidth"]))
