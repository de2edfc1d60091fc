"""One YAML per experiment. A section ``{name: swin, depths: [2, 2, 8, 2]}`` calls that constructor with the rest as
keywords, so the constructor's signature is the schema: there is no second list of options to keep in step.

``load`` reads, applies ``key=value`` overrides and refuses unknown keys, offering the nearest valid one; ``build``
makes the objective. Nothing here is imported by another module of the package but ``medfast.__main__``.
"""

from __future__ import annotations

import copy
import difflib
import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from medfast.architectures import BACKBONES, NETWORKS
from medfast.data.loader import Stream
from medfast.objectives import MASKS, OBJECTIVES
from medfast.training import Optim, Train
from medfast.types import Objective

SECTIONS = ("objective", "data", "optim", "train", "deepspeed", "init", "out")
_TABLES: dict[str, Mapping[str, Callable]] = {
    "objective": OBJECTIVES,
    "backbone": {**BACKBONES, **NETWORKS},
    "mask": MASKS,
}
_GIVEN_BY_TRAINING = {"seed", "batch", "views", "split"}  # arguments of Stream that are no option of the data section
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")  # YAML 1.1 reads 1e-3 as a string


class ConfigError(ValueError):
    """What the user wrote cannot be run; the message says what is accepted."""


def load(path: str | Path, *overrides: str, tiny: bool = False, steps: int | None = None) -> dict[str, Any]:
    """The experiment in ``path`` with overrides ``section.key=value`` applied, every key checked against what it calls.

    tiny: shrink to seconds a step on two cores (see ``TINY``). steps: length of the run. Raises ConfigError.
    """
    import yaml

    try:
        config = yaml.safe_load(Path(path).read_text())
    except FileNotFoundError:
        raise ConfigError(f"there is no file {path}; presets are in configs/") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is no valid YAML: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path} must hold the sections {', '.join(SECTIONS)}, it holds {type(config).__name__}")
    config = _numbers(config)
    if tiny:
        _shrink(config)
    for override in overrides:
        _override(config, override)
    if steps is not None:
        if steps < 1:
            raise ConfigError(f"--steps must be at least 1, got {steps}")
        config.setdefault("train", {})["steps"] = steps
    validate(config)
    return config


def validate(config: dict[str, Any]) -> None:
    """Raise ConfigError at the first key that nothing reads."""
    _known("the configuration", config, SECTIONS)
    if "objective" not in config:
        raise ConfigError("the configuration has no section objective; write objective: {name: smart, ...}")
    _check_call("objective", config["objective"], "objective")
    for section, schema in (("data", _data_keys()), ("optim", _keys(Optim)), ("train", _keys(Train))):
        _known(section, config.get(section) or {}, schema)
    if config.get("init"):
        _known("init", config["init"], ("from", "part", "allow_partial"))


def build(config: Mapping[str, Any]) -> Objective:
    """The objective of a loaded configuration, its parameters drawn from train.seed alone."""
    seed = (config.get("train") or {}).get("seed", _default(Train, "seed"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _build("objective", config["objective"], "objective")


def _build(path: str, section: Mapping[str, Any], table: str) -> Any:
    call = _resolve(path, section, table)
    arguments = {
        key: _build(f"{path}.{key}", value, key) if _is_call(key, value) else value
        for key, value in section.items()
        if key != "name"
    }
    try:
        return call(**arguments)
    except TypeError as error:
        raise ConfigError(f"{path}: {error}") from error


def _is_call(key: str, value: Any) -> bool:
    return key in _TABLES and isinstance(value, Mapping) and "name" in value


def _check_call(path: str, section: Any, table: str) -> None:
    if not isinstance(section, Mapping):
        raise ConfigError(f"{path} must be a section like {{name: ...}}, got {section!r}")
    call = _resolve(path, section, table)
    _known(path, {key: value for key, value in section.items() if key != "name"}, _keys(call))
    for key, value in section.items():
        if key in _TABLES and isinstance(value, Mapping):
            _check_call(f"{path}.{key}", value, key)


def _resolve(path: str, section: Mapping[str, Any], table: str) -> Callable:
    """The callable a section names: an entry of the table, or ``package.module:Name`` for code outside medfast."""
    name = section.get("name")
    entries = _TABLES[table]
    if isinstance(name, str) and ":" in name:
        module, _, attribute = name.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise ConfigError(f"{path}.name = {name!r} cannot be imported: {error}") from None
    if not isinstance(name, str) or name not in entries:
        kind = "architecture" if table == "backbone" else table
        raise ConfigError(f"{path}: no {kind} called {name!r}{_nearest(str(name), entries)}")
    return entries[name]


def _override(config: dict[str, Any], override: str) -> None:
    """Apply ``a.b.c=value``; the key must exist in the file or in the signature it belongs to (checked afterwards)."""
    import yaml

    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"an override is written section.key=value, got {override!r}")
    *parents, last = key.split(".")
    _known("the configuration", {(parents or [last])[0]: None}, SECTIONS)
    target = config
    for parent in parents:
        if target.get(parent) is None:
            target[parent] = {}
        target = target[parent]
        if not isinstance(target, dict):
            raise ConfigError(f"{override!r}: {parent} is a value, not a section")
    target[last] = _numbers(yaml.safe_load(text))


def _known(path: str, section: Any, accepted: Any) -> None:
    if not isinstance(section, Mapping):
        raise ConfigError(f"{path} must be a section of key: value lines, got {section!r}")
    for key in section:
        if key not in accepted:
            where = f"{path}.{key}" if path != "the configuration" else str(key)
            raise ConfigError(f"unknown key {where}{_nearest(str(key), accepted)}")


def _nearest(given: str, accepted: Any) -> str:
    names = sorted(map(str, accepted))
    close = difflib.get_close_matches(given, names, n=1, cutoff=0.5)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return f"{hint}. There are: {', '.join(names)}"


def _keys(call: Callable) -> tuple[str, ...]:
    return tuple(name for name in inspect.signature(call).parameters if name != "self")


def _default(call: Callable, name: str) -> Any:
    return inspect.signature(call).parameters[name].default


def _data_keys() -> tuple[str, ...]:
    return tuple(key for key in _keys(Stream) if key not in _GIVEN_BY_TRAINING)


def _numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _numbers(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_numbers(entry) for entry in value]
    return float(value) if isinstance(value, str) and _NUMBER.fullmatch(value) else value


# What --tiny puts in place of a preset's sizes. Only sizes: the objective, its losses and its schedules stay.
TINY: dict[str, dict[str, Any]] = {
    "backbone": {"embed": 12, "depths": [2, 2, 2, 2], "heads": [1, 2, 4, 8], "sa_heads": 4},
    "objective": {"prototypes": 256, "head_widths": [128, 128, 64]},
    "data": {"size": 64},
    "train": {"batch": 2, "steps": 20, "validate_every": 0, "checkpoint_every": 20},
}


def _shrink(config: dict[str, Any]) -> None:
    """Apply TINY where the preset's constructor has that option, in place."""
    objective = config.get("objective") or {}
    for key, value in copy.deepcopy(TINY["objective"]).items():
        if key in _keys(_resolve("objective", objective, "objective")):
            objective[key] = value
    backbone = objective.get("backbone") or {}
    if backbone:
        accepted = _keys(_resolve("objective.backbone", backbone, "backbone"))
        for key, value in copy.deepcopy(TINY["backbone"]).items():
            if key in accepted:  # as many stages as the preset has
                backbone[key] = value[: len(backbone.get(key, value))] if isinstance(value, list) else value
    for section in ("data", "train"):
        config.setdefault(section, {}).update(copy.deepcopy(TINY[section]))
