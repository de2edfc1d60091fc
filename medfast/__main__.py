"""The command line: assembles everything, is imported by nobody.

Exit codes: 0 done; 2 usage; 3 data integrity; 4 stopped by an alarm; 69 a rank is hung or missing; 74 a file could not
be written (disk full, read-only); 75 preempted after a saved checkpoint.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from medfast import runs as run_verbs
from medfast.data import command as data_verbs
from medfast.planning import command as planning_verbs

USAGE, DATA, ALARM, WRITING = 2, 3, 4, 74
BENCHMARKS = {  # scripts of benchmarks/, in the order they run
    "kernels": ("window_attention", "swin_model", "token_contrast", "masking", "tokens"),
    "architectures": ("architectures", "models"),
    "data": ("prepare", "crops"),
    "step": ("step", "overheads"),
    "plan": ("memory", "traffic"),
    "objectives": ("objectives",),
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
        if options.local_rank is not None:
            from medfast.training.launch import same_rank

            same_rank(options.local_rank, os.environ)
        return options.run(options) or 0
    except Exception as error:
        code = _exit_code(error)
        if code is None or os.environ.get("MEDFAST_TRACEBACK"):
            raise
        print(f"medfast: {error}", file=sys.stderr)
        return code


def _exit_code(error: Exception) -> int | None:
    from medfast.data.store import DataError
    from medfast.training import LOST, Diverged, RankLost

    codes = (  # the first that fits: a file that is missing is an OSError too
        (DataError, DATA), (Diverged, ALARM), (RankLost, LOST),
        ((ValueError, FileNotFoundError, ModuleNotFoundError), USAGE), (OSError, WRITING),
    )  # fmt: skip
    return next((code for kind, code in codes if isinstance(error, kind)), None)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="medfast", description="Pretraining of 3D medical transformers on CT volumes."
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher puts it first
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    doctor = commands.add_parser("doctor", help="what is installed, what is missing, which backend each operator uses")
    doctor.set_defaults(run=_doctor)

    data_verbs.add(commands)
    run_verbs.add(commands)

    _add_drill(commands)
    planning_verbs.add(commands)
    bench = commands.add_parser("bench", help="CPU benchmark rows, appended to benchmarks/results of this checkout")
    bench.add_argument("what", choices=tuple(BENCHMARKS))
    bench.set_defaults(run=_bench)

    models = commands.add_parser("models", help="every architecture: parameters, cost, papers")
    models.set_defaults(run=_models)
    _add_check(commands)
    _add_interchange(commands)
    return parser


def _add_check(commands) -> None:
    """check learn, check ablations."""
    verbs = commands.add_parser("check", help="is learning seen? linear probes on phantoms whose organs are known")
    verbs = verbs.add_subparsers(required=True, dest="what", metavar="WHAT")
    for name, told in (("learn", "each objective against random initialisation"),
                       ("ablations", "known directions of the papers' ablations")):  # fmt: skip
        verb = verbs.add_parser(name, help=told)
        verb.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
        verb.add_argument("--steps", type=int, help="of every run, instead of as many as docs/learning.md says")
        verb.add_argument("--out", type=Path, default=Path("runs/check"), help="store, runs, tables (runs/check)")
        verb.add_argument("--page", type=Path, help="a Markdown file that gets the table too, e.g. docs/learning.md")
        if name == "learn":
            verb.add_argument("--objectives", nargs="+", metavar="NAME", help="default: all")
        verb.set_defaults(run=_check)


def _add_drill(commands) -> None:
    drill = commands.add_parser("drill", help="break short runs on purpose, and see what becomes of them")
    drill.add_argument("config", type=Path, metavar="CONFIG", help="a YAML file; runs are as small as --tiny has them")
    drill.add_argument("--out", type=Path, default=Path("runs/drill"), help="for drill.jsonl (default runs/drill)")
    drill.add_argument("--quick", action="store_true", help="one or two injections of each group, in a minute")
    drill.add_argument("--only", metavar="WORDS", help="the injections with these words in their name")
    drill.add_argument("overrides", nargs="*", metavar="section.key=value")
    drill.set_defaults(run=_drill)


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


def _drill(options: argparse.Namespace) -> int:
    """1 where something did not go as it must."""
    from medfast.drill import drill

    return drill(options.config, options.overrides, options.out, main, quick=options.quick, only=options.only)


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


def _check(options: argparse.Namespace) -> None:
    from medfast import check

    if options.what == "learn":
        print(check.learn(options.out, options.seeds, options.objectives, options.steps, options.page))
    else:
        print(check.ablations(options.out, options.seeds, options.steps, options.page))


def _import(options: argparse.Namespace) -> None:
    from medfast import config as configuration
    from medfast.interchange import import_weights

    if options.config is not None:
        section = configuration.load(options.config)["objective"].get("backbone")
        run_verbs.require({"backbone": section}, "backbone", "--backbone '{name: ...}'", "the architecture")
    else:
        section = configuration.parse(options.backbone)
    import_weights(options.weights, options.kind, section, options.out, partial=options.partial)


def _export(options: argparse.Namespace) -> None:
    from medfast.interchange import export_weights

    export_weights(options.source, options.kind, options.out, part=options.part, partial=options.partial)


if __name__ == "__main__":
    sys.exit(main())
