"""The command ``medfast plan``."""

from __future__ import annotations

import argparse
from pathlib import Path

__all__ = ["add"]


def add(commands) -> None:
    """Add the verb to the subparsers of the command line."""
    plan = commands.add_parser("plan", help="memory, time and ZeRO stage of an experiment on GPUs elsewhere")
    plan.add_argument("config", type=Path, metavar="CONFIG", help="a YAML file, e.g. configs/smart.yaml")
    plan.add_argument("--gpus", required=True, metavar="8xA100-80", help="COUNTxNAME, or NODESxCOUNTxNAME")
    plan.add_argument("--volumes", type=int, help="of the store, to say how many epochs the steps are")
    plan.add_argument("--network", type=float, default=200.0, metavar="GBIT", help="Gb/s of a node to others (200)")
    plan.add_argument("--tiny", action="store_true", help="the preset as pretrain --tiny has it")
    plan.add_argument("overrides", nargs="*", metavar="section.key=value")
    plan.set_defaults(run=_plan)


def _plan(options: argparse.Namespace) -> None:
    from medfast import config as configuration
    from medfast.planning.hardware import cluster
    from medfast.planning.plan import make
    from medfast.planning.text import describe

    for name in ("volumes", "network"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            raise ValueError(f"--{name} must be above 0, got {value}")
    place = cluster(options.gpus, options.network * 1e9 / 8)
    config = configuration.load(options.config, *options.overrides, tiny=options.tiny)
    print(describe(make(lambda: configuration.build(config), config, place), str(options.config), options.volumes))
