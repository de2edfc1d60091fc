"""Launches of two ranks, the second of which meets with something: ``lost_rank.py FOLDER FAULT...``, for test_watchdog.

What they import is imported once, then every rank is a fork; each leaves FOLDER/FAULT_RANK.{code,stderr}.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from pathlib import Path

import tiny_task as task

from medfast.__main__ import _exit_code
from medfast.training import pretrain
from medfast.types import Batch

LIMIT = 6.0  # seconds; a loaded machine may need several for a step


class Faulty(task.Memory):
    def __init__(self, fault: str):
        super().__init__()
        self.fault = fault

    def batch(self, step, slots) -> Batch:
        if step == 3 and self.fault == "hung":
            time.sleep(600)
        elif step == 3 and self.fault == "frozen":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif step == 3 and self.fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        elif step == 3 and self.fault == "error":
            raise ValueError("volume v7 is damaged")
        return super().batch(step, slots)


def rank(folder: Path, fault: str, number: int, port: int) -> int:
    """What one rank does; its exit code."""
    os.environ |= {"RANK": str(number), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    settings = task.config(folder / fault, train__watchdog_s=LIMIT, train__checkpoint_every=2, train__validate_crops=0)
    try:
        pretrain(task.build(), settings, Faulty(fault if number else ""), task.Memory(split=1))
    except Exception as error:  # noqa: BLE001 - as the command line does
        print(f"medfast: {error}", file=sys.stderr, flush=True)
        return _exit_code(error) or 1
    return 0


def forked(folder: Path, fault: str, number: int, port: int) -> int:
    """The process of a rank."""
    process = os.fork()
    if not process:
        with (folder / f"{fault}_{number}.stderr").open("w") as file:
            os.dup2(file.fileno(), 2)
            os._exit(rank(folder, fault, number, port))
    return process


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main(folder: Path, faults: list[str]) -> None:
    running = {}
    for fault in faults:
        port = free_port()
        for number in range(1 if fault == "missing" else 2):
            running[forked(folder, fault, number, port)] = (fault, number)
    frozen = {name: process for process, name in running.items()}.get(("frozen", 1))
    while running:
        process, status = os.wait()
        fault, number = running.pop(process)
        (folder / f"{fault}_{number}.code").write_text(str(os.waitstatus_to_exitcode(status)))
        if (fault, number) == ("frozen", 0) and frozen:  # a launcher would end it
            os.kill(frozen, signal.SIGKILL)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
