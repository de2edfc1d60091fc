"""The tables of docs/scaling.md, from the formulas of medfast/planning/traffic.py: ``traffic.py --tables``."""

from __future__ import annotations

import torch

from medfast.architectures import ARCHITECTURES
from medfast.planning.hardware import GPUS, NETWORK, PER_NODE
from medfast.planning.traffic import payloads, sent

GPU_COUNTS = (4, 8, 32, 128, 512)
STAGES = (0, 1, 2, 3)
NETS = {  # name in the tables -> constructor, its arguments
    "SMART's Swin": ("swin", {"semantic_attention": 3}),
    "ViT-B": ("vit", {}),
    "Swin, 1 B": ("swin", {"embed": 384, "depths": (2, 2, 20, 2), "heads": (12, 24, 48, 96)}),
}
WIRES = {  # column -> bytes/s that a rank sends
    "NVLink of an A100": GPUS["A100-80"].nvlink,
    "one 200 Gb/s link a node": NETWORK,
    "eight 200 Gb/s links a node": 8 * NETWORK,
}


def parameters(net: str) -> int:
    """Counted, without making any."""
    name, settings = NETS[net]
    with torch.device("meta"):
        return sum(p.numel() for p in ARCHITECTURES[name](**settings).parameters())


def tables() -> str:
    """Bytes a rank sends in a step, and the least time that takes, one micro-batch."""
    return f"{volumes()}\n\n{times()}"


def volumes() -> str:
    heads = ("network", "parameters", "GPUs", "stage 0", "stages 1, 2", "stage 3", "sharded teacher, more")
    lines = [f"| {' | '.join(heads)} |", "|---|" + "--:|" * (len(heads) - 1)]
    for net in NETS:
        size = 4 * parameters(net)
        for ranks in GPU_COUNTS:
            cells = [sent(payloads(stage, size), ranks) / 1e9 for stage in (0, 1, 3)]
            cells.append(sent({"all_gather": size / 2}, ranks) / 1e9)
            lines.append(f"| {net} | {size // 4:,} | {ranks} | " + " | ".join(f"{x:.3f}" for x in cells) + " |")
    return "\n".join(lines)


def times() -> str:
    lines = [f"| network | GPUs | stage | {' | '.join(WIRES)} |", "|---|--:|--:|" + "--:|" * len(WIRES)]
    for net in NETS:
        size = 4 * parameters(net)
        for ranks in (PER_NODE, 512):
            for stage in (0, 1, 3):
                took = [1e3 * sent(payloads(stage, size), ranks) / wire for wire in WIRES.values()]
                inside = ranks <= PER_NODE  # then NVLink is all there is, and beyond it never is the slowest
                cells = [f"{x:.1f}" if inside == (at == 0) else "-" for at, x in enumerate(took)]
                lines.append(f"| {net} | {ranks} | {stage} | {' | '.join(cells)} |")
    return "\n".join(lines)
