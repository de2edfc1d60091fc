"""``medfast data VERB``: the arguments, and the call behind each verb."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

__all__ = ["add"]

INPUT = "a folder, an image, a 'glob', or a list (.csv or .jsonl with a column image; Decathlon or nnssl .json)"


def add(commands: Any) -> None:
    """Add the command ``data`` to argparse's subparsers."""
    verbs = commands.add_parser("data", help="look at, prepare and check volumes")
    verbs = verbs.add_subparsers(required=True, metavar="VERB")
    _add_scan(verbs)
    _add_prepare(verbs)
    verify = verbs.add_parser("verify", help="re-hash every volume of a store")
    verify.add_argument("store", type=Path, metavar="STORE")
    verify.add_argument("--explain", metavar="ID", help="instead, tell all that the store knows of one volume")
    verify.set_defaults(run=_verify)
    _add_copies(verbs)
    show = verbs.add_parser("show", help="draw a stored volume, its crops and masks as a PNG")
    show.add_argument("store", type=Path, metavar="STORE")
    show.add_argument("volume", metavar="ID")
    show.add_argument("--out", type=Path, help="the PNG to write (default: ID.png)")
    show.add_argument("--size", type=int, default=128, help="crop, voxels (default 128)")
    show.add_argument("--crops", type=int, default=2)
    show.add_argument("--mask", type=float, default=0.7, metavar="SHARE", help="of 16-voxel cells (default 0.7)")
    show.add_argument("--seed", type=int, default=0)
    show.set_defaults(run=_show)
    phantoms = verbs.add_parser("phantoms", help="write CT-like NIfTI phantoms, to try medfast without data")
    phantoms.add_argument("folder", type=Path, metavar="FOLDER")
    phantoms.add_argument("--count", type=int, default=12)
    phantoms.add_argument("--seed", type=int, default=0)
    phantoms.add_argument("--spacing", type=float, help="mm, of all along all axes (default: several)")
    phantoms.add_argument("--labels", action="store_true", help="write where 11 organs are as well, and a list of both")
    phantoms.set_defaults(run=_phantoms)


def _add_scan(verbs: Any) -> None:
    scan = verbs.add_parser("scan", help="judge every header, look at a few volumes, forecast the store")
    scan.add_argument("input", metavar="INPUT", help=INPUT)
    scan.add_argument("--out", type=Path, default=Path("scan"), help="folder of the page (default: scan)")
    scan.add_argument("--samples", type=int, default=6, help="volumes that are read whole (default 6)")
    _add_settings(scan)
    scan.set_defaults(run=_scan)


def _add_prepare(verbs: Any) -> None:
    prepare = verbs.add_parser("prepare", help="resample images once into a store")
    prepare.add_argument("input", metavar="INPUT", help=INPUT)
    prepare.add_argument("--store", type=Path, required=True, help="folder to write; an unfinished one is resumed")
    prepare.add_argument("--max-bad", type=float, default=0.02, metavar="SHARE",
                         help="exit 3 when more are unusable (default 0.02; 1 takes whatever is usable)")  # fmt: skip
    prepare.add_argument("--part", metavar="K/N", help="the K-th of N runs side by side; one run without it joins them")
    prepare.add_argument("--layout", default="npy", help="npy (default), or blosc2: half the disk, slower crops")
    prepare.add_argument("--dry-run", action="store_true", help="write nothing; forecast size and time of the store")
    _add_settings(prepare)
    prepare.set_defaults(run=_prepare)


def _add_copies(verbs: Any) -> None:
    pack = verbs.add_parser("pack", help="copy a store into few large files, or into another layout")
    pack.add_argument("store", type=Path, metavar="STORE")
    pack.add_argument("--out", type=Path, required=True, metavar="STORE", help="a new folder, or an unfinished one")
    pack.add_argument("--layout", help="npy or blosc2 (default: as it is)")
    pack.add_argument("--shard-gb", type=float, default=2.0, metavar="GB", help="size of a shard (default 2)")
    pack.add_argument("--plain", action="store_true", help="a file a volume, no shards")
    pack.set_defaults(run=_pack)
    migrate = verbs.add_parser("migrate", help="bring a store of an earlier version to this one, in place")
    migrate.add_argument("store", type=Path, metavar="STORE")
    migrate.set_defaults(run=_migrate)


def _add_settings(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--spacing", type=float, default=2.0, help="isotropic voxel size in mm (default 2)")
    verb.add_argument("--modality", default="ct", help="ct, mr, or xr for radiographs (PNG, DICOM), default ct")
    verb.add_argument("--unit", help="HU (ct), percentile or zscore (mr, xr; default percentile)")
    verb.add_argument("--kernel", default="triangle", help="triangle (default), area or linear")
    verb.add_argument("--executor", default="torch", help="what resamples: torch (default) or dali")
    verb.add_argument("--channels", type=int, help="volumes in the fourth axis of each file (default: no fourth axis)")
    verb.add_argument("--body", action="store_true", help="keep only the box around the largest body")
    verb.add_argument("--straighten", action="store_true", help="take volumes whose axes lean (gantry tilt), resampled")
    verb.add_argument("--jobs", type=int, help="volumes at a time (default: as many as this process has cores)")


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    names = ("spacing", "modality", "unit", "kernel", "executor", "channels", "body", "straighten")
    return {name: getattr(options, name) for name in names}


def _scan(options: argparse.Namespace) -> None:
    from medfast.data.scan_page import scan

    scan(options.input, options.out, jobs=options.jobs, count=options.samples, **_settings(options))


def _prepare(options: argparse.Namespace) -> None:
    from medfast.data.prepare import prepare

    if options.dry_run:
        return _forecast(options)
    prepare(options.input, options.store, max_bad=options.max_bad, jobs=options.jobs, part=options.part,
            layout=options.layout, **_settings(options))  # fmt: skip


def _forecast(options: argparse.Namespace) -> None:
    from medfast.data.inputs import find
    from medfast.data.layouts import check
    from medfast.data.prepare import default_jobs, parse_part
    from medfast.data.recipe import recipe
    from medfast.data.scan import forecast, samples, survey

    settled, jobs = recipe(**_settings(options)), options.jobs or default_jobs()
    if settled["dimensions"] == 2:
        raise ValueError("pictures (modality xr) are stored as they are, two bytes a pixel: nothing to forecast")
    share = parse_part(options.part)
    cases = find(options.input)[share.start :: share.step]
    rows = survey(cases, settled, jobs)
    print(forecast(rows, samples(cases, rows, settled, count=8), jobs, check(options.layout)))


def _verify(options: argparse.Namespace) -> None:
    from medfast.data.store import Store, explain, verify

    store = Store(options.store)
    if options.explain is not None:
        print(json.dumps(explain(store, options.explain), indent=1))
    else:
        print(f"{verify(store)} volumes, every hash is right")


def _pack(options: argparse.Namespace) -> None:
    from medfast.data.pack import pack

    made = pack(options.store, options.out, layout=options.layout, shard_gb=options.shard_gb, plain=options.plain)
    print(f"{options.out}: {len(made)} volumes, {made.layout}, {'a file each' if options.plain else 'in shards'}")


def _migrate(options: argparse.Namespace) -> None:
    from medfast.data.migrate import migrate

    print(migrate(options.store))


def _show(options: argparse.Namespace) -> None:
    from medfast.data.show import show

    out = options.out or Path(f"{options.volume}.png")
    print(show(options.store, options.volume, out, size=options.size, crops=options.crops, mask=options.mask,
               seed=options.seed))  # fmt: skip


def _phantoms(options: argparse.Namespace) -> None:
    from medfast.data.phantom import write_phantoms

    write_phantoms(options.folder, options.count, options.seed, spacing=options.spacing, labels=options.labels)
    print(f"{options.count} phantoms in {options.folder}")
