"""GPUs and what joins them, by their makers' data sheets: ceilings, of which a share is reached."""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["GPUS", "Cluster", "Gpu", "cluster"]

PER_NODE = 8
NETWORK = 25e9  # bytes/s of a node, each way: one link of 200 Gb/s


@dataclass(frozen=True)
class Gpu:
    """memory: bytes. bandwidth: bytes/s. bf16, fp32: FLOP/s, dense, without TF32. nvlink: bytes/s that it sends."""

    memory: float
    bandwidth: float
    bf16: float
    fp32: float
    nvlink: float


GPUS = {
    "A100-40": Gpu(40e9, 1.56e12, 312e12, 19.5e12, 300e9),
    "A100-80": Gpu(80e9, 2.0e12, 312e12, 19.5e12, 300e9),
    "H100-80": Gpu(80e9, 3.35e12, 989e12, 67e12, 450e9),
    "H200-141": Gpu(141e9, 4.8e12, 989e12, 67e12, 450e9),
}


@dataclass(frozen=True)
class Cluster:
    """nodes x per_node GPUs called name. network: bytes/s that a node sends to others."""

    name: str
    gpu: Gpu
    nodes: int
    per_node: int
    network: float

    @property
    def ranks(self) -> int:
        return self.nodes * self.per_node

    @property
    def wire(self) -> float:
        """Bytes/s of the slowest wire that a collective over all ranks goes through, per rank. NCCL's rings cross from
        node to node once each way, so one node's network carries what one rank sends, whatever its number of GPUs."""
        return self.gpu.nvlink if self.nodes == 1 else min(self.gpu.nvlink, self.network)


def cluster(text: str, network: float = NETWORK) -> Cluster:
    """ "8xA100-80": so many GPUs, in nodes of 8; "16x4xA100-80": nodes x GPUs of a node. Raises ValueError."""
    match = re.fullmatch(r"(?:(\d+)x)?(\d+)x([\w-]+)", text)
    if match is None or match[3] not in GPUS:
        raise ValueError(
            f"--gpus is COUNTxNAME, as 8xA100-80, or NODESxCOUNTxNAME, got {text!r}; names are {', '.join(GPUS)}"
        )
    nodes, count, name = match[1], int(match[2]), match[3]
    if count < 1 or nodes == "0":
        raise ValueError(f"--gpus needs at least one GPU, got {text!r}")
    if nodes is not None:
        return Cluster(name, GPUS[name], int(nodes), count, network)
    if count > PER_NODE and count % PER_NODE:
        raise ValueError(f"--gpus {text}: {count} are no whole nodes of {PER_NODE}; write NODESxCOUNTx{name}")
    return Cluster(name, GPUS[name], -(-count // PER_NODE), min(count, PER_NODE), network)
