"""From what a user names (folder, file, glob, list) to cases: one image each, with label and patient where given."""

from __future__ import annotations

import csv
import glob
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medfast.data import dicom
from medfast.data.store import DataError

__all__ = ["Case", "find"]

VOLUMES = (".nii", ".nii.gz", ".nrrd", ".mha")
PICTURES = (".png",)
SLICES = (".dcm", ".dicom", ".ima")
IMAGE, LABEL, GROUP = ("image", "image_path"), ("label", "label_path"), ("group", "patient", "subject", "subject_id")
DATASET = ("dataset", "dataset_name")


@dataclass(frozen=True)
class Case:
    """One image. files: one, or the slices of one DICOM series. label: a volume on its grid. group: the patient.
    dataset: what it is a part of. Both stay out of the store, which knows them by a salted hash."""

    files: tuple[Path, ...]
    label: Path | None = None
    group: str | None = None
    dataset: str | None = None

    @property
    def path(self) -> Path:
        """What stands for the case in the private ledger."""
        return self.files[0]


def find(where: str | Path, axes: int = 3) -> list[Case]:
    """Cases of a folder, a file, a glob, or a list (.csv, .jsonl, .json), sorted by path; none twice.

    axes: 3 takes volumes, 2 takes pictures. Relative paths in a list start at the list. Raises ValueError for what is
    not there or is no list, DataError where there is no image, ModuleNotFoundError for DICOM without pydicom.
    """
    text, path = str(where), Path(where)
    if not path.exists() and any(sign in text for sign in "*?["):
        cases = [case for found in sorted(glob.glob(text, recursive=True)) for case in _cases(Path(found), axes)]
    elif not path.exists():
        raise ValueError(f"there is no {where}; INPUT is a folder, an image, a 'glob', or a list (.csv, .jsonl, .json)")
    elif path.suffix.lower() in (".csv", ".jsonl", ".json"):
        cases = [case for row in _rows(path) for case in _listed(path, row, axes)]
    else:
        cases = _cases(path, axes)
    if not cases:
        names = ", ".join((*(VOLUMES if axes == 3 else PICTURES), "DICOM"))
        raise DataError(f"no usable {'volume' if axes == 3 else 'picture'} in {where}: it holds no file of {names}")
    return sorted({case.files: case for case in reversed(cases)}.values(), key=lambda case: case.files)


def _cases(where: Path, axes: int) -> list[Case]:
    """Cases of a folder or of one file."""
    if where.is_file():
        return [Case((where.resolve(),))]
    files = sorted(Path(folder, name) for folder, _, names in os.walk(where) for name in names)
    wanted = VOLUMES if axes == 3 else PICTURES
    found = [Case((file.resolve(),)) for file in files if file.name.lower().endswith(wanted) and not file.is_dir()]
    slices = [file.resolve() for file in files if _is_dicom(file)]
    groups = dicom.by_series(slices) if axes == 3 and slices else [((file,), None) for file in slices]
    return found + [Case(group, group=patient) for group, patient in groups]


def _is_dicom(file: Path) -> bool:
    """By name, or by content where the name has no ending of letters (1.2.840.113, IM00001)."""
    if file.name.lower().endswith(SLICES):
        return file.is_file()
    if file.suffix[1:].isalpha() or file.suffix[1:2].isalpha() or not file.is_file():
        return False
    with file.open("rb") as stream:
        return stream.read(132)[128:] == b"DICM"


def _rows(file: Path) -> list[dict[str, Any]]:
    """Rows of a list; each has a key of IMAGE."""
    text = file.read_text(encoding="utf-8-sig")
    try:
        if file.suffix.lower() == ".csv":
            rows: list[Any] = list(csv.DictReader(text.splitlines()))
        elif file.suffix.lower() == ".jsonl":
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            rows = list(_walk(json.loads(text)))
    except ValueError as error:
        raise ValueError(f"{file} is no list of images: {error}") from None
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not _value(row, IMAGE):
            keys = sorted(row) if isinstance(row, dict) else type(row).__name__
            raise ValueError(f"row {number} of {file} has no 'image' (it has {keys}); a list names one image a row, "
                             "with 'label' and 'patient' where there are any")  # fmt: skip
    return rows


def _walk(node: Any, group: Any = None, dataset: Any = None) -> Iterator[dict[str, Any]]:
    """Images of a JSON document, wherever they stand: a plain list, the Decathlon's training and test lists, or the
    collection > datasets > subjects > sessions > images of nnssl, whose subject is the patient."""
    if isinstance(node, dict):
        group, dataset = _value(node, GROUP) or group, _value(node, DATASET) or dataset
        if _value(node, IMAGE):
            yield {"group": group, "dataset": dataset, **node}
            return
        for name, child in node.items():
            if name in ("test", "training", "validation") and isinstance(child, list):
                child = [{"image": item} if isinstance(item, str) else item for item in child]
            if name == "datasets" and isinstance(child, dict):
                for called, part in child.items():
                    yield from _walk(part, group, called)
            else:
                yield from _walk(child, group, dataset)
    elif isinstance(node, list):
        for child in node:
            yield from _walk(child, group, dataset)


def _listed(source: Path, row: dict[str, Any], axes: int) -> list[Case]:
    place = lambda text: source.parent / os.path.expandvars(str(text))  # noqa: E731 - an absolute path replaces it
    image, label, group = place(_value(row, IMAGE)), _value(row, LABEL), _value(row, GROUP)
    dataset = str(_value(row, DATASET) or "") or None
    cases = _cases(image, axes) if image.is_dir() else [Case((image.resolve(),))]
    if label and len(cases) > 1:
        raise ValueError(f"{source} gives one label for {image}, a folder of {len(cases)} images")
    return [Case(case.files, place(label).resolve() if label else None, str(group) if group else case.group, dataset)
            for case in cases]  # fmt: skip


def _value(row: dict[str, Any], names: tuple[str, ...]) -> Any:
    return next((row[name] for name in names if row.get(name)), None)
