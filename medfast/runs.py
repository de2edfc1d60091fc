"""What is done with a run from the command line: pretrain, replay, report."""

from __future__ import annotations

import argparse
from pathlib import Path

__all__ = ["add", "require"]

RESUMES = ("auto", "never", "must")
DIFFERS = 3  # exit code of a replay that is not what the run wrote down: data integrity


def add(commands) -> None:
    """The verbs, into argparse's sub-commands."""
    pretrain = commands.add_parser("pretrain", help="run an experiment")
    pretrain.add_argument("config", type=Path, metavar="CONFIG", help="a YAML file, e.g. configs/smart.yaml")
    pretrain.add_argument("--tiny", action="store_true", help="shrink any preset to seconds a step on two cores")
    pretrain.add_argument("--steps", type=int, help="length of the run in optimizer steps")
    pretrain.add_argument("--resume", choices=RESUMES, help="train.resume: auto (default) goes on where the folder is")
    pretrain.add_argument("overrides", nargs="*", metavar="section.key=value")
    pretrain.set_defaults(run=_pretrain)

    again = commands.add_parser("replay", help="one step of a run once more: batch, masks and losses of a rank")
    again.add_argument("run_folder", type=Path, metavar="RUN")
    again.add_argument("--step", type=int, required=True, help="as in metrics.jsonl, from 0")
    again.add_argument("--rank", type=int, default=0)
    again.add_argument("--store", type=Path, help="where the store is now, if it has moved since the run")
    again.set_defaults(run=_replay)

    report = commands.add_parser("report", help="one self-contained page about a run")
    report.add_argument("run_folder", type=Path, metavar="RUN")
    report.add_argument("--store", type=Path, help="where the store is now, if it has moved since the run")
    report.set_defaults(run=_report)


def _pretrain(options: argparse.Namespace) -> None:
    from medfast import config as configuration
    from medfast.training import pretrain

    given = [*options.overrides, *([f"train.resume={options.resume}"] if options.resume else [])]
    config = configuration.load(options.config, *given, tiny=options.tiny, steps=options.steps)
    require(config, "out", "out=runs/NAME", "the run folder")
    config.setdefault("data", {})
    require(config["data"], "store", "data.store=STORE", "the prepared volumes (medfast data prepare)")
    if options.tiny and config["objective"]["name"] in configuration.STAND_INS:
        print(f"--tiny: {configuration.STAND_INS[config['objective']['name']]}")
    objective = configuration.build(config)
    stream, holdout = _open_train(config, objective), _open_holdout(config, objective.views)
    missing = sorted(objective.needs - (stream.gives & holdout.gives))
    if missing:
        raise ValueError(
            f"the objective {config['objective']['name']} reads {missing}, which this data section does not make: "
            "rotation comes with data.rotate=true, flip with data.flip=true, uncut with data.cutout=true, and the "
            "first two for held-out crops with data.plain_holdout=false"
        )
    _check_channels(objective, stream)
    pretrain(objective, config, stream, holdout)


def _replay(options: argparse.Namespace) -> int:
    """3 where something is not what the run wrote down."""
    from medfast import config as configuration
    from medfast.training import replay

    config = _of_a_run(options)
    objective = configuration.build(config)
    stream = _open_train(config, objective)
    same = replay(objective, config, stream, options.run_folder, options.step, options.rank)
    words = {
        None: "the run wrote nothing down that this can be compared with",
        True: "the same as the run wrote down, bit for bit",
        False: "NOT what the run wrote down",
    }
    print(words[same])
    return DIFFERS if same is False else 0


def _report(options: argparse.Namespace) -> None:
    from medfast import config as configuration
    from medfast.evaluation import report
    from medfast.training import checkpoint

    config = _of_a_run(options)
    objective = configuration.build(config)
    newest = checkpoint.latest(options.run_folder)
    if newest is None:
        raise FileNotFoundError(f"{options.run_folder} has no finished checkpoint yet; nothing to report")
    checkpoint.read_into(objective, newest)
    print(report(options.run_folder, objective, _open_holdout(config, objective.views), config))


def _of_a_run(options: argparse.Namespace) -> dict:
    """The configuration that a run folder holds, with --store where that is given."""
    from medfast import config as configuration

    resolved = options.run_folder / "config.resolved.yaml"
    if not resolved.exists():
        raise FileNotFoundError(f"{options.run_folder} is no run folder: it has no config.resolved.yaml")
    config = configuration.load(resolved)
    if options.store is not None:
        config["data"]["store"] = str(options.store)
    return config


def _check_channels(objective, stream) -> None:
    """ValueError where the objective's backbone takes other views than the store has."""
    backbone = getattr(objective, "backbone", None)
    wanted = getattr(getattr(backbone, "encoder", backbone), "in_channels", stream.channels)
    if wanted != stream.channels:
        raise ValueError(
            f"the backbone takes {wanted} channel(s), the store has {stream.channels}: set "
            f"objective.backbone.in_channels={stream.channels}, or give another store"
        )


def _open_train(config: dict, objective):
    """The stream that a run trains on."""
    from medfast import config as configuration
    from medfast.data.loader import open_stream

    train = configuration.train_settings(config)
    return open_stream(config["data"], seed=train.seed, batch=train.batch, views=objective.views, split="train",
                       ahead=objective.ahead)  # fmt: skip


def _open_holdout(config: dict, views: int):
    """Held-out crops, the same whatever a run's seed and batch, and with no augmentation in what must be restored."""
    from medfast.data.loader import open_stream
    from medfast.objectives.held_out import HOLDOUT_BATCH, HOLDOUT_SEED

    data = {**config["data"], "intensity": None, "weights": None, "shuffle": True}
    return open_stream(data, seed=HOLDOUT_SEED, batch=HOLDOUT_BATCH, views=views, split="holdout")


def require(section: dict, key: str, example: str, what: str) -> None:
    if not section.get(key):
        raise ValueError(f"{what} is not given: add {example} to the command line")
