"""The command line: assembles everything, is imported by nobody.

Exit codes: 0 done; 2 usage; 3 data integrity; 4 stopped by an alarm; 75 preempted after a saved checkpoint.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from medfast.data import command as data_verbs

USAGE, DATA, ALARM = 2, 3, 4
BENCHMARKS = {  # scripts of benchmarks/, in the order they run
    "kernels": ("window_attention", "swin_model", "token_contrast", "masking", "tokens"),
    "architectures": ("architectures", "models"),
    "data": ("crops",),
    "step": ("step",),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. Errors of the user are one sentence, MEDFAST_TRACEBACK=1 shows all."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and not (hasattr(options, "overrides") and all("=" in x and not x.startswith("-") for x in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # key=value may also come after the options, where argparse does not look for it
        options.overrides += rest
    try:
        return options.run(options) or 0
    except Exception as error:
        code = _exit_code(error)
        if code is None or os.environ.get("MEDFAST_TRACEBACK"):
            raise
        print(f"medfast: {error}", file=sys.stderr)
        return code


def _exit_code(error: Exception) -> int | None:
    from medfast.data.store import DataError
    from medfast.training import Diverged

    if isinstance(error, DataError):
        return DATA
    if isinstance(error, Diverged):
        return ALARM
    if isinstance(error, (ValueError, FileNotFoundError, ModuleNotFoundError)):
        return USAGE
    return None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="medfast", description="Pretraining of 3D medical transformers on CT volumes."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    doctor = commands.add_parser("doctor", help="what is installed, what is missing, which backend each operator uses")
    doctor.set_defaults(run=_doctor)

    data_verbs.add(commands)

    pretrain = commands.add_parser("pretrain", help="run an experiment")
    pretrain.add_argument("config", type=Path, metavar="CONFIG", help="a YAML file, e.g. configs/smart.yaml")
    pretrain.add_argument("--tiny", action="store_true", help="shrink any preset to seconds a step on two cores")
    pretrain.add_argument("--steps", type=int, help="length of the run in optimizer steps")
    pretrain.add_argument("overrides", nargs="*", metavar="section.key=value")
    pretrain.set_defaults(run=_pretrain)

    report = commands.add_parser("report", help="one self-contained page about a run")
    report.add_argument("run_folder", type=Path, metavar="RUN")
    report.add_argument("--store", type=Path, help="where the store is now, if it has moved since the run")
    report.set_defaults(run=_report)

    bench = commands.add_parser("bench", help="CPU benchmark rows, appended to benchmarks/results of this checkout")
    bench.add_argument("what", choices=tuple(BENCHMARKS))
    bench.set_defaults(run=_bench)

    models = commands.add_parser("models", help="every architecture: parameters, cost, papers")
    models.set_defaults(run=_models)
    _add_interchange(commands)
    return parser


def _add_interchange(commands) -> None:
    """import, export."""
    taken = commands.add_parser("import", help="public weights (MONAI, SMIT, nnFormer ...) -> ours")
    taken.add_argument("weights", type=Path, metavar="WEIGHTS", help=".safetensors, or a .pt that holds tensors alone")
    taken.add_argument(
        "--as", dest="kind", required=True, metavar="FORMAT", help="what WEIGHTS is, e.g. monai_swin_unetr"
    )
    what = taken.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", type=Path, help="an experiment whose objective.backbone the weights are of")
    what.add_argument("--backbone", metavar="YAML", help="the architecture itself, e.g. '{name: swin_unetr}'")
    taken.add_argument("--out", type=Path, required=True, metavar="CKPT.safetensors")
    taken.add_argument("--partial", action="store_true", help="take a file that holds less than 95 %% of the numbers")
    taken.set_defaults(run=_import)
    given = commands.add_parser("export", help="weights of a run -> a public format, with a model card")
    given.add_argument("source", type=Path, metavar="CHECKPOINT|RUN", help="or a .safetensors file of medfast import")
    given.add_argument("--as", dest="kind", default="medfast", metavar="FORMAT", help="e.g. monai_swin_unetr")
    given.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    given.add_argument("--part", choices=("student", "teacher"), default="student")
    given.add_argument(
        "--partial", action="store_true", help="write a format that holds less than 95 %% of the numbers"
    )
    given.set_defaults(run=_export)


def _doctor(options: argparse.Namespace) -> None:
    from medfast.doctor import doctor

    print(doctor())


def _pretrain(options: argparse.Namespace) -> None:
    from medfast import config as configuration
    from medfast.data.loader import open_stream
    from medfast.training import pretrain

    config = configuration.load(options.config, *options.overrides, tiny=options.tiny, steps=options.steps)
    _require(config, "out", "out=runs/NAME", "the run folder")
    _require(config.setdefault("data", {}), "store", "data.store=STORE", "the prepared volumes (medfast data prepare)")
    if options.tiny and config["objective"]["name"] in configuration.STAND_INS:
        print(f"--tiny: {configuration.STAND_INS[config['objective']['name']]}")
    objective = configuration.build(config)
    train = configuration.train_settings(config)
    stream = open_stream(config["data"], seed=train.seed, batch=train.batch, views=objective.views, split="train",
                         ahead=objective.ahead)  # fmt: skip
    missing = sorted(objective.needs - stream.gives)
    if missing:
        raise ValueError(
            f"the objective {config['objective']['name']} reads {missing}, which this data section does not make: "
            "rotation comes with data.rotate=true, flip with data.flip=true, uncut with data.cutout=true"
        )
    pretrain(objective, config, stream, _open_holdout(config, objective.views))


def _report(options: argparse.Namespace) -> None:
    from medfast import config as configuration
    from medfast.evaluation import report
    from medfast.training import checkpoint

    resolved = options.run_folder / "config.resolved.yaml"
    if not resolved.exists():
        raise FileNotFoundError(f"{options.run_folder} is no run folder: it has no config.resolved.yaml")
    config = configuration.load(resolved)
    if options.store is not None:
        config["data"]["store"] = str(options.store)
    objective = configuration.build(config)
    newest = checkpoint.latest(options.run_folder)
    if newest is None:
        raise FileNotFoundError(f"{options.run_folder} has no finished checkpoint yet; nothing to report")
    checkpoint.read_into(objective, newest)
    print(report(options.run_folder, objective, _open_holdout(config, objective.views), config))


def _bench(options: argparse.Namespace) -> int:
    """Exit code of the first script that fails, 0 if none does."""
    folder = Path(__file__).parents[1] / "benchmarks"
    if not folder.is_dir():
        raise FileNotFoundError("the benchmarks are no part of the installed package: run this in a checkout")
    for script in BENCHMARKS[options.what]:
        code = subprocess.run([sys.executable, str(folder / f"{script}.py")], check=False).returncode
        if code:
            return code
    return 0


def _models(options: argparse.Namespace) -> None:
    from medfast.models import table

    print(table())


def _import(options: argparse.Namespace) -> None:
    from medfast import config as configuration
    from medfast.interchange import import_weights

    if options.config is not None:
        section = configuration.load(options.config)["objective"].get("backbone")
        _require({"backbone": section}, "backbone", "--backbone '{name: ...}'", "the architecture")
    else:
        section = configuration.parse(options.backbone)
    import_weights(options.weights, options.kind, section, options.out, partial=options.partial)


def _export(options: argparse.Namespace) -> None:
    from medfast.interchange import export_weights

    export_weights(options.source, options.kind, options.out, part=options.part, partial=options.partial)


def _open_holdout(config: dict, views: int):
    """Held-out crops, the same whatever a run's seed and batch, and with no augmentation in what must be restored."""
    from medfast.data.loader import open_stream
    from medfast.objectives.held_out import HOLDOUT_BATCH, HOLDOUT_SEED

    data = {**config["data"], "intensity": None}
    return open_stream(data, seed=HOLDOUT_SEED, batch=HOLDOUT_BATCH, views=views, split="holdout")


def _require(section: dict, key: str, example: str, what: str) -> None:
    if not section.get(key):
        raise ValueError(f"{what} is not given: add {example} to the command line")


if __name__ == "__main__":
    sys.exit(main())
