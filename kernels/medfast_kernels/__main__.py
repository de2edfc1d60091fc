"""python -m medfast_kernels [table | qualify [OPERATOR ...] | tune]: which backend runs which operator here, and why.

table (or nothing)  what is built, and of each operator and backend: chosen, runs if asked for, or why not
qualify             check and time every backend on each device of this machine, and keep the verdict for later runs
tune                time launch configurations of the Triton kernels on this machine's GPU, and keep the best
Kept in MEDFAST_CACHE, else in the cache folder of the system.
"""

from __future__ import annotations

import argparse
import sys

import torch

from ._dispatch import (
    BACKENDS,
    OPERATORS,
    Refused,
    choose,
    devices,
    evidence,
    facts,
    interpreted,
    no_evidence,
    proven,
    why_not,
)
from ._evidence import device_name, verdict_path


def table() -> None:
    """Operator, backend and what becomes of it, on each device."""
    for name, value in facts().items():
        print(f"{name:<20} {value}")
    for device in devices():
        print(f"\non {device}, {device_name(device)}")
        for operator in OPERATORS:
            try:
                chosen = choose(operator, device)
            except (Refused, ValueError) as reason:  # MEDFAST_BACKEND asks for what cannot run
                chosen = None
                print(f"  {operator:<16} ERROR      {reason}")
            for name in BACKENDS:
                reason = why_not(operator, name, device)
                print(f"  {operator:<16} {name:<10} {reason or ('chosen' if name == chosen else 'runs if asked for')}")
        for found in evidence(device):
            print(f"  evidence: {found.source}{' (inferred)' if found.inferred else ''}")
        if device.type == "cuda" and not any(proven(operator, device) for operator in OPERATORS):
            print(f"  {no_evidence(device)}")


def qualify(operators: tuple[str, ...]) -> None:
    from ._qualify import qualify

    for device in reversed(devices()):  # a GPU before the CPU: it has more to tell
        print(f"on {device}, {device_name(device)}")
        for operator, name, row in qualify(device, operators):
            if row["correct"]:
                ratio = row["reference_ms"] / row["ms"]
                said = f"right ({row['share of budget']:.0%} of the budget)  {row['ms']:9.3f} ms  x{ratio:.2f}"
            else:
                said = f"WRONG: {row['why']}"
            print(f"  {operator:<16} {name:<10} {said}", flush=True)
        print(f"  kept in {verdict_path(device)}")


def tune() -> int:
    if all(device.type != "cuda" for device in devices()):
        print("tune times Triton's launch configurations on an NVIDIA GPU, and torch finds none here", file=sys.stderr)
        return 2
    from ._tune import tune

    print(f"kept in {tune(torch.device('cuda', torch.cuda.current_device()))}")
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=f"python -m {__package__}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("table")
    commands.add_parser("qualify").add_argument("operators", nargs="*", default=OPERATORS, metavar="OPERATOR")
    commands.add_parser("tune")
    options = parser.parse_args(arguments)
    if options.command in ("qualify", "tune") and interpreted():
        parser.error(f"{options.command} times kernels: unset TRITON_INTERPRET")
    if options.command == "tune":
        return tune()
    if options.command == "qualify":
        if unknown := [name for name in options.operators if name not in OPERATORS]:
            parser.error(f"no operator {', '.join(unknown)}; there are {', '.join(OPERATORS)}")
        qualify(tuple(options.operators))
    else:
        table()
    return 0


if __name__ == "__main__":
    sys.exit(main())
