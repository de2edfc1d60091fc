"""One YAML per experiment. A section ``{name: swin, depths: [2, 2, 8, 2]}`` calls that constructor with the rest as
keywords, so the constructor's signature is the schema: there is no second list of options to keep in step.

``load`` reads, applies ``key=value`` overrides and refuses unknown keys, offering the nearest valid one, and values
that do not fit the constructor's annotations; ``build`` makes the objective. Nothing here is imported by another module
of the package but ``medfast.__main__``, ``medfast.runs`` and ``medfast.check``.
"""

from __future__ import annotations

import copy
import difflib
import importlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from medfast.annotations import fit, hints
from medfast.architectures import ARCHITECTURES, BACKBONES, ENCODERS
from medfast.data.loader import Stream
from medfast.objectives import MASKS, OBJECTIVES
from medfast.training import Optim, Train, deepspeed_engine, start
from medfast.types import Network, Objective

SECTIONS = ("objective", "data", "optim", "train", "deepspeed", "init", "out")
_TABLES: dict[str, Mapping[str, Callable]] = {
    "objective": OBJECTIVES,
    "backbone": ARCHITECTURES,
    "encoder": {**ARCHITECTURES, **BACKBONES},  # of an objective that asks for no network
    "mask": MASKS,
}
# arguments of Stream that are no option of the data section
_GIVEN_BY_TRAINING = {"seed", "batch", "views", "split", "ahead"}
_INIT = {"from": str | None, "part": str | None, "allow_partial": bool}
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")  # YAML 1.1 reads 1e-3 as a string


class ConfigError(ValueError):
    """What the user wrote cannot be run; the message says what is accepted."""


def load(path: str | Path, *overrides: str, tiny: bool = False, steps: int | None = None) -> dict[str, Any]:
    """The experiment in ``path`` with overrides ``section.key=value`` applied, checked by ``validate``.

    tiny: shrink to seconds a step on two cores (see ``TINY``). steps: length of the run. Raises as ``validate`` does.
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
    _shape(config)
    if tiny:
        _shrink(config)
    for override in overrides:
        _override(config, override)
    _shape(config)
    if steps is not None:
        if steps < 1:
            raise ConfigError(f"--steps must be at least 1, got {steps}")
        config.setdefault("train", {})["steps"] = steps
    return validate(config)


def validate(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with whole floats as ints where ints are wanted, and the defaults of train and optim.

    Every key and value is checked against what it calls. Raises ConfigError at a key that nothing reads, ValueError at
    a value of the wrong kind and at settings that contradict each other.
    """
    _shape(config)
    checked = {**config, "objective": _checked_call("objective", config["objective"], "objective")}
    for section, known in (("data", _data_hints()), ("optim", hints(Optim)), ("train", hints(Train))):
        checked[section] = _checked(section, config.get(section, {}), known)
    checked["out"] = fit("out", config.get("out"), str | None)
    checked, train, optim = start.resolve(checked)
    deepspeed_engine.check(config.get("deepspeed"), optim, train)
    if config.get("init") is not None:
        checked["init"] = _checked("init", config["init"], _INIT)
        start.check_init(checked["init"], checked["objective"].get("backbone"))
    return checked


def train_settings(config: Mapping[str, Any]) -> Train:
    """The section train of a loaded configuration, with its defaults."""
    return Train(**config.get("train", {}))


def build(config: Mapping[str, Any]) -> Objective:
    """The objective of a loaded configuration, its parameters drawn from train.seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(train_settings(config).seed)
        return _build("objective", config["objective"], "objective")


def parse(text: str) -> dict[str, Any]:
    """A section written on the command line: '{name: swin, embed: 48}'. ConfigError for anything else."""
    import yaml

    try:
        section = _numbers(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise ConfigError(f"{text!r} is no valid YAML: {error}") from None
    _check_call("the section", section)
    return section


def build_backbone(section: Mapping[str, Any]) -> Any:
    """The backbone or network of a section {name: ..., settings}, checked as ``load`` does, parameters of seed 0."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _build("backbone", _checked_call("backbone", section, "backbone"), "backbone")


def _build(path: str, section: Mapping[str, Any], table: str) -> Any:
    call = _resolve(path, section, table)
    known = hints(call)
    arguments = {
        key: _build(f"{path}.{key}", value, _table(key, known.get(key))) if _is_call(key, value) else value
        for key, value in section.items()
        if key != "name"
    }
    try:
        return call(**arguments)
    except TypeError as error:
        raise ConfigError(f"{path}: {error}") from error


def _table(key: str, annotation: Any) -> str:
    """Where the name in the section ``key`` is looked up: the annotation decides between encoder and network."""
    return "encoder" if key == "backbone" and annotation is not Network else key


def _is_call(key: str, value: Any) -> bool:
    return key in _TABLES and isinstance(value, Mapping) and "name" in value


def _shape(config: Mapping[str, Any]) -> None:
    """ConfigError unless the sections are known ones and those that hold settings are sections."""
    _known("the configuration", config, SECTIONS)
    if "objective" not in config:
        raise ConfigError("the configuration has no section objective; write objective: {name: smart, ...}")
    _check_call("objective", config["objective"])
    for section in ("data", "optim", "train"):
        _known(section, config.get(section, {}), None)


def _check_call(path: str, section: Any) -> None:
    if not isinstance(section, Mapping) or "name" not in section:
        raise ConfigError(f"{path} must be a section like {{name: ...}}, got {section!r}")


def _checked_call(path: str, section: Any, table: str) -> dict[str, Any]:
    _check_call(path, section)
    given = {key: value for key, value in section.items() if key != "name"}
    encoder = f"{section['name']}_encoder"  # whoever reads the result alone, or its weights, must not take the network
    name = encoder if table == "encoder" and encoder in ENCODERS else section["name"]
    return {"name": name, **_checked(path, given, hints(_resolve(path, section, table)))}


def _checked(path: str, section: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """The section, each value as its annotation in ``known`` has it."""
    _known(path, section, known)
    return {
        key: _checked_call(f"{path}.{key}", value, _table(key, known[key])) if key in _TABLES and value is not None
        else fit(f"{path}.{key}", value, known[key])
        for key, value in section.items()
    }  # fmt: skip


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
        kind = "architecture" if table in ("backbone", "encoder") else table
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
    try:
        target[last] = _numbers(yaml.safe_load(text))
    except yaml.YAMLError:
        raise ConfigError(f"{override!r}: the value is no valid YAML; lists are written [1, 2]") from None


def _known(path: str, section: Any, accepted: Any) -> None:
    if not isinstance(section, Mapping):
        raise ConfigError(f"{path} must be a section of key: value lines, got {section!r}")
    for key in section:
        if accepted is not None and key not in accepted:
            where = f"{path}.{key}" if path != "the configuration" else str(key)
            raise ConfigError(f"unknown key {where}{_nearest(str(key), accepted)}")


def _nearest(given: str, accepted: Any) -> str:
    names = sorted(map(str, accepted))
    close = difflib.get_close_matches(given, names, n=1, cutoff=0.5)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return f"{hint}. There are: {', '.join(names)}"


def _data_hints() -> dict[str, Any]:
    known = {key: hint for key, hint in hints(Stream).items() if key not in _GIVEN_BY_TRAINING}
    return {**known, "store": str | None}  # presets leave it to the command line


def _numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _numbers(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_numbers(entry) for entry in value]
    return float(value) if isinstance(value, str) and _NUMBER.fullmatch(value) else value


# What --tiny puts in place of a preset's sizes. Only sizes: the objective, its losses and its schedules stay. An
# architecture whose constructor means other things by the same names has an entry of its own.
TINY: dict[str, dict[str, Any]] = {
    "backbone": {"embed": 12, "depths": [2, 2, 2, 2], "heads": [1, 2, 4, 8], "sa_heads": 4},
    "dae_former": {"widths": [16, 32, 64], "depths": [1, 1, 1]},
    "swinfuse": {
        "embed": 12,
        "depths": [1, 1, 1, 1],
        "heads": [1, 2, 4, 8],
        "dim_width": 12,
        "dim_heads": [1, 1, 1, 1],
    },
    "vit": {"size": 64, "embed": 48, "depth": 2, "heads": 4},
    "objective": {
        "prototypes": 256,
        "head_widths": [128, 128, 64],
        "decoder_width": 48,
        "decoder_depth": 2,
        "decoder_heads": 4,
        "group": 2,
        "hidden": 128,
        "width": 64,
    },
    "data": {"size": 64},
    "train": {"batch": 2, "steps": 20, "validate_every": 0, "checkpoint_every": 20},
}


# What stands in, on a store of CT volumes, for what an objective's paper trains on.
STAND_INS = {
    "sdda_mae": "axial slices of the store's volumes stand in for radiographs and ultrasound images",
    "swinfuse": "a second view of a CT volume stands in for MR, and attention among tokens for attention among planes",
}


def _shrink(config: dict[str, Any]) -> None:
    """Apply TINY where the preset's constructor has that option, in place."""
    objective = config["objective"] = _checked_call("objective", config["objective"], "objective")
    known = hints(_resolve("objective", objective, "objective"))
    for key, value in copy.deepcopy(TINY["objective"]).items():
        if key in known:
            objective[key] = value
    backbone = objective.get("backbone") or {}
    if backbone:
        accepted = hints(_resolve("objective.backbone", backbone, _table("backbone", known["backbone"])))
        for key, value in copy.deepcopy(TINY.get(backbone["name"].removesuffix("_encoder"), TINY["backbone"])).items():
            if key in accepted:  # as many stages as the preset has
                backbone[key] = value[: len(backbone.get(key, value))] if isinstance(value, list) else value
    size = (config.get("data") or {}).get("size")
    for section in ("data", "train"):
        config.setdefault(section, {}).update(copy.deepcopy(TINY[section]))
    if isinstance(size, list):  # a slice stays a slice
        config["data"]["size"] = [min(length, TINY["data"]["size"]) for length in size]
