"""What ranks send each other in an optimizer step, by ZeRO stage.

Formulas of what DeepSpeed 0.19 does with fp32 gradients and parameters (torch_autocast) and of our teacher, with
benchmarks/traffic.py holding them against the collectives that ranks really call. N ranks, M micro-batches, T bytes of
trained parameters and E of the teacher's in fp32; a payload is the size of the whole tensor:

  0, ddp    all-reduce T
  1         all-reduce T, all-gather T
  2         M x all-reduce T, all-gather T
  3         M x (2 x all-gather T, reduce-scatter T)
  teacher   nothing where it is replicated, all-gather of its replica (E/2 in bf16) where it is sharded

ZeRO's paper has a reduce-scatter at stages 1 and 2; DeepSpeed all-reduces there and keeps a part (its
use_multi_rank_bucket_allreduce), which sends twice as much.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["payloads", "sent"]

PASSES = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1}  # over the payload, by bandwidth-optimal algorithms


def payloads(
    stage: int, trained: float, micro_batches: int = 1, replica: float = 0.0, checkpointed: bool = False
) -> dict[str, float]:  # fmt: skip
    """Collective -> bytes of its payloads in an optimizer step.

    stage: of ZeRO, 0 for plain all-reduce too. trained: bytes of the trained parameters in fp32. replica: bytes of the
    teacher's where it is sharded. checkpointed: activations are computed again, for which stage 3 gathers once more.
    """
    if stage == 0:
        found = {"all_reduce": trained}
    elif stage in (1, 2):
        found = {"all_reduce": trained * (micro_batches if stage == 2 else 1), "all_gather": trained}
    elif stage == 3:
        gathers = 3 if checkpointed else 2
        found = {"all_gather": gathers * micro_batches * trained, "reduce_scatter": micro_batches * trained}
    else:
        raise ValueError(f"ZeRO has the stages 0 to 3, got {stage}")
    if replica:
        found["all_gather"] = found.get("all_gather", 0) + replica
    return found


def sent(payload: Mapping[str, float], ranks: int) -> float:
    """Bytes that a rank sends, and as many that it receives, where each collective sends the least that it can:
    (N - 1) / N of the payload for an all-gather and a reduce-scatter, twice that for an all-reduce."""
    return sum(PASSES[name] * size for name, size in payload.items()) * (ranks - 1) / ranks
