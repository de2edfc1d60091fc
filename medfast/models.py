"""``medfast models``: every architecture in the sizes of its papers, what it costs and who it is from.

Parameters are counted where the table is printed. FLOPs and memory are rows that benchmarks/models.py measured.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from medfast.architectures import BACKBONES, NETWORKS

ROWS = Path(__file__).parents[1] / "benchmarks" / "results" / "models.jsonl"
SIZES = (96, 128)
TABLES = {"backbone": BACKBONES, "network": NETWORKS}


@dataclass(frozen=True)
class Model:
    """One line: constructor arguments that make the paper's network. table: "backbone" or "network"."""

    label: str
    table: str
    name: str
    papers: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    flat: bool = False

    def build(self, **more: Any):
        return TABLES[self.table][self.name](**{**self.settings, **more})


_SMIT = {"depths": (2, 2, 4, 2), "heads": (4, 4, 4, 4), "qkv_bias": False}
_BRATS = {"in_channels": 4, "patch": 4, "embed": 96, "heads": (3, 6, 12, 24)}

MODELS = (
    Model("swin", "backbone", "swin", "iBOT, MST (Swin rows)"),
    Model("swin, semantic attention", "backbone", "swin", "SMART, DAGMaN, AttMask", {"semantic_attention": 3}),
    Model("swin, SMIT", "backbone", "swin", "SMIT", _SMIT),
    Model("swinfuse", "backbone", "swinfuse", "SwinFUSE"),
    Model("swinfuse, dim_width 48", "backbone", "swinfuse", "SwinFUSE, sane memory", {"dim_width": 48}),
    Model("vit", "backbone", "vit", "MAE, SimMIM, MoCo v3"),
    Model("vit, [CLS]", "backbone", "vit", "SMART and DAGMaN (ViT rows), AttMask", {"cls": True}),
    Model("nnformer encoder", "backbone", "nnformer", "SimTROT"),
    Model("dae_former encoder", "backbone", "dae_former", "SDDA-MAE", flat=True),
    Model("resnet50", "backbone", "resnet50", "DAGMaN (Med3D)"),
    Model("swin_unetr", "network", "swin_unetr", "SwinFUSE, SimTROT"),
    Model("smit_unet", "network", "smit_unet", "SMART, DAGMaN"),
    Model("smit_unet, SMIT", "network", "smit_unet", "SMIT", {**_SMIT, "classes": 14}),
    Model("unetr", "network", "unetr", "SimTROT"),
    Model("nnformer, Synapse", "network", "nnformer", "SimTROT"),
    Model("nnformer, BraTS", "network", "nnformer", "SimTROT",
          {**_BRATS, "classes": 4, "decoder_heads": (6, 12, 24), "deep_supervision": False}),
    Model("dae_former", "network", "dae_former", "SDDA-MAE", flat=True),
)  # fmt: skip


def table() -> str:
    """The whole table as text."""
    measured = _measured()
    heads = ["architecture", "papers", "parameters", "channels", "strides"]
    heads += [f"{what} {size}" for size in SIZES for what in ("GFLOP", "GB")]
    lines = [heads, *([model.label, model.papers, *_shape(model), *_cost(model, measured)] for model in MODELS)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    right = {"parameters", *heads[5:]}
    text = [
        "  ".join(
            cell.rjust(w) if head in right else cell.ljust(w) for head, cell, w in zip(heads, line, widths, strict=True)
        )
        for line in lines
    ]
    return "\n".join(line.rstrip() for line in text) + "\n\n" + _legend(measured)


def count(model: Model) -> int:
    """Parameters, without making any."""
    with torch.device("meta"):
        return sum(p.numel() for p in model.build().parameters())


def _shape(model: Model) -> list[str]:
    with torch.device("meta"):
        net = model.build()
    encoder = getattr(net, "encoder", net)
    strides = ["x".join(map(str, s)) if isinstance(s, tuple) else str(s) for s in encoder.strides]
    return [f"{count(model):,}", "-".join(map(str, encoder.channels)), "-".join(strides)]


def _cost(model: Model, measured: Mapping[tuple[str, int], dict]) -> list[str]:
    cells = []
    for size in SIZES:
        row = measured.get((model.label, size), {})
        gflop, peak = row.get("gflop"), row.get("peak_gb")
        cells += ["-" if gflop is None else f"{gflop:,.0f}", "-" if peak is None else f"{peak:.1f}"]
    return cells


def _measured() -> dict[tuple[str, int], dict]:
    """The newest row of each model and size; none where the benchmarks are not beside the package."""
    lines = ROWS.read_text().splitlines() if ROWS.is_file() else []
    return {(row["model"], row["size"]): row for row in map(json.loads, lines)}


def _legend(measured: Mapping[tuple[str, int], dict]) -> str:
    sizes = " and ".join(f"{size}^3" for size in SIZES)
    if not measured:
        return f"FLOPs and memory at {sizes} are not measured here: python benchmarks/models.py writes the rows."
    where = sorted({f"{row['device']}, commit {row['commit']}" for row in measured.values()})
    return (
        f"GFLOP: forward, a multiplication and its addition are two. GB: peak of forward and backward in fp32, weights "
        f"and gradients included, batch 1, {sizes} voxels (dae_former: pixels squared). Measured on {'; '.join(where)}."
    )
