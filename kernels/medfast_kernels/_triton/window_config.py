"""How the kernels of window attention are launched: warps, stages, programs. Nothing is tried out at call time.

tuned.json, written by ``python -m medfast_kernels tune``, overrules the rules here, the user's own in the cache folder
before the one beside this file: {device name: {operator: {shape class: {"num_warps": 4, "num_stages": 2,
"per_processor": 3}}}}.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import NamedTuple

import torch

from .._evidence import cache_folder

FILE = "tuned.json"
_INTERPRETED_PROCESSORS = 3  # few enough to be quick, enough for sums of several partials


class Config(NamedTuple):
    """num_warps, num_stages: Triton's; per_processor: programs of a persistent kernel on each multiprocessor."""

    num_warps: int
    num_stages: int
    per_processor: int

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


trials: dict[str, Config] = {}  # operator: what ``tune`` is timing


def shape_class(dim: int, tokens: int, dtype: torch.dtype) -> str:
    """The name of a class of calls in tuned.json."""
    return f"dim {dim}, tokens {tokens}, {str(dtype).removeprefix('torch.')}"


def config(operator: str, dim: int, tokens: int, dtype: torch.dtype, device: torch.device) -> Config:
    """The configuration of ``operator`` ("window_attention" or "window_attention_backward") for a class of calls."""
    if operator in trials:
        return trials[operator]
    rule = _rule(operator, dim, dtype)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return rule._replace(**_tuned().get(name, {}).get(operator, {}).get(shape_class(dim, tokens, dtype), {}))


def _rule(operator: str, dim: int, dtype: torch.dtype) -> Config:
    wide = dim > 32 or dtype == torch.float32
    if operator == "window_attention":  # 12: whole rounds, be it three (sm_80) or four (sm_90) that have registers
        return Config(8 if wide else 4, 2 if dim <= 16 else 1, 2 if wide else 12)
    return Config(8 if wide else 4, 1, 1 if wide else 2)


def processors(device: torch.device) -> int:
    """Multiprocessors of the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return _INTERPRETED_PROCESSORS


@functools.cache
def _tuned() -> dict[str, dict[str, dict[str, dict[str, int]]]]:
    """Both files; where they differ, the user's."""
    merged: dict[str, dict[str, dict[str, dict[str, int]]]] = {}
    for path in (Path(__file__).with_name(FILE), cache_folder() / FILE):
        for name, operators in (json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}).items():
            for operator, classes in operators.items():
                merged.setdefault(name, {}).setdefault(operator, {}).update(classes)
    return merged


def forget() -> None:
    """Read the files again at the next call."""
    _tuned.cache_clear()
