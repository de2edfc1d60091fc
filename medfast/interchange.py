"""Files of weights, in and out: public checkpoints to ours, ours to public formats with a description and a card.

    imported   FILE.safetensors, and config.json beside it
    exported   FOLDER/{model.safetensors, config.json, README.md}

Nothing here writes where something was, who it was of, or what it was called: sources are told by their checksum.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from medfast import __version__, cards, config
from medfast.architectures import interop
from medfast.architectures.interop import Match
from medfast.training import checkpoint, start

CONFIG = "config.json"
_HOLDERS = ("state_dict", "model_state_dict", "model", "network", "net")  # keys that checkpoints keep weights under


def import_weights(
    path: Path, kind: str, section: Mapping[str, Any], out: Path, *, partial: bool = False,
    say: Callable[[str], None] = print,
) -> Match:  # fmt: skip
    """Weights in a public format -> ``out``, a .safetensors file under our names, and config.json beside it.

    section: {name: ..., settings} of the architecture. Settings that it leaves open become those under which ours
    computes what theirs does. Says what matched. ValueError, and nothing written, where under 95 % of the numbers do
    (unless ``partial``), and where the file needs more than tensors to be read.
    """
    if out.suffix != ".safetensors":
        raise ValueError(f"--out must be a .safetensors file, got {out.name}")
    how = interop.layout(kind, section.get("name", ""))
    for name, value in how.settings.items():
        if name in section and section[name] != value:
            say(f"{name}={section[name]!r} is kept, though the format's own networks compute with {name}={value!r}")
    section = {**section, **{name: value for name, value in how.settings.items() if name not in section}}
    module = config.build_backbone(section)
    given, outside = interop.to_ours(read_weights(path), kind, section["name"])
    match = interop.fill(module, given, outside, how.names.unread, partial=partial)
    say(str(match))
    about = _about(section, {"format": kind, "sha256": _sha256(path)})
    beside = out.parent / CONFIG
    if beside.exists() and json.loads(beside.read_text()).get("architecture") != about["architecture"]:
        raise ValueError(f"{beside} describes another network: give --out a folder of its own")
    _write(out, module.state_dict(), about)
    return match


def export_weights(
    source: Path, kind: str, out: Path, *, part: str = "student", partial: bool = False,
    say: Callable[[str], None] = print,
) -> Match:  # fmt: skip
    """A run, one of its checkpoints, or an imported .safetensors file -> a folder in a public format.

    part: "student" or "teacher" of a run. Says what the format does not hold; ValueError, and nothing written, where
    that is more than 5 % of the numbers, unless ``partial``.
    """
    section, state, origin = _weights(source, part)
    theirs, match = interop.to_theirs(state, kind, section)
    if match.unread:
        say(f"format {kind!r} has no place for {len(match.unread)} tensors: {match.share:.1%} of the numbers go along")
    if match.share < interop.ENOUGH and not partial:
        raise ValueError(
            f"format {kind!r} holds {match.share:.1%} of this network, without {match.unread[0]!r} and others; under "
            f"{interop.ENOUGH:.0%} is refused unless you ask for a partial export"
        )
    about = {**_about(section, origin), "format": kind}
    out.mkdir(parents=True, exist_ok=True)
    _write(out / "model.safetensors", theirs, about)
    (out / "README.md").write_text(cards.card(kind, about, match))
    say(f"{len(theirs)} tensors in {out}")
    return match


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict in a .safetensors file, or in a checkpoint of torch.save that holds nothing but tensors and plain
    values. ValueError for others: reading them would run whatever code they name."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, KeyError) as error:
        raise ValueError(
            f"{path.name} holds more than tensors and plain values, or is no checkpoint, and is not read, because that "
            "would run code it names. If you trust it, load it yourself and save its state dict alone: "
            f"torch.save(checkpoint['state_dict'], 'weights.pt') ({str(error).splitlines()[0][:120]})"
        ) from None
    return _tensors(found, path.name)


def _tensors(found: Any, name: str) -> dict[str, Tensor]:
    if isinstance(found, Mapping):
        if found and all(isinstance(value, Tensor) for value in found.values()):
            return dict(found)
        for key in _HOLDERS:
            if isinstance(found.get(key), Mapping):
                return _tensors(found[key], name)
        told = f"keys {', '.join(map(str, list(found)[:8]))}"
    else:
        told = f"a {type(found).__name__}"
    raise ValueError(f"{name} holds {told}: expected tensors by name, or one of the keys {', '.join(_HOLDERS)}")


def _weights(source: Path, part: str) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any]]:
    """(section of the architecture, its weights, where they are from)."""
    if source.suffix == ".safetensors":
        about = start.described(source) if source.is_file() else None
        if about is None or about["format"] != "medfast":
            raise ValueError(f"{source.name} is no file that `medfast import` wrote: import it first")
        return about["architecture"], read_weights(source), {"format": "medfast", "sha256": _sha256(source)}
    folder = source if (source / "meta.json").exists() else checkpoint.latest(source)
    if folder is None:
        raise ValueError(f"{source} is neither a run with a finished checkpoint nor a checkpoint")
    resolved = folder.parent.parent / "config.resolved.yaml"
    section = config.load(resolved)["objective"].get("backbone")
    if section is None:
        raise ValueError(f"{resolved} has no objective.backbone, so nothing says what the weights are of")
    parts, meta = checkpoint.load(folder)
    if part not in ("student", "teacher"):
        raise ValueError(f"--part is student or teacher, got {part!r}")
    held = {**parts["state"], **parts["student"]} if part == "student" else parts["teacher"]
    state = {name.removeprefix(start.BACKBONE): x for name, x in held.items() if name.startswith(start.BACKBONE)}
    if not state:
        raise ValueError(
            f"this run has no {part} of its backbone" + (": export the student" if part != "student" else "")
        )
    origin = {"part": part, "step": meta["step"], "sha256": _sha256(folder / f"{part}.safetensors")}
    return section, state, origin


def _about(section: Mapping[str, Any], origin: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json and the metadata of the file say."""
    with torch.device("meta"):
        parameters = sum(p.numel() for p in config.build_backbone(section).parameters())
    return {"medfast": __version__, "format": "medfast", "architecture": dict(section), "parameters": parameters,
            "source": dict(origin)}  # fmt: skip


def _write(path: Path, state: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: x.detach().clone().contiguous() for name, x in state.items()}
    save_file(tensors, path, metadata={"medfast": json.dumps(about, sort_keys=True), "format": "pt"})
    (path.parent / CONFIG).write_text(json.dumps(about, indent=1, sort_keys=True) + "\n")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
