"""What launchers say to ranks: torchrun, DeepSpeed's, and SLURM's srun, which has other names for it."""

from __future__ import annotations

import re
from collections.abc import Mapping

__all__ = ["first_host", "ranks", "same_rank"]

_STEP = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")  # a batch script has the first too: it is no task of a job step
_PORTS = 20_000, 20_000  # the first port, and how many follow: below Linux's ephemeral ones, which start at 32,768


def ranks(environ: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT of a task of ``srun``; {} of anything else, and where
    a launcher has set RANK already (torchrun and DeepSpeed's, also inside of srun).

    What the environment has of them already holds. The address is the first host of the step, the port one of the job's
    and the step's number, so that jobs that share a node do not meet. Raises ValueError where the list of hosts cannot
    be read.
    """
    if "RANK" in environ or not all(name in environ for name in _STEP):
        return {}
    found = {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": environ["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environ.get("SLURM_LOCALID", "0"),
        "MASTER_ADDR": environ.get("MASTER_ADDR") or (
            "127.0.0.1" if environ["SLURM_STEP_NUM_TASKS"] == "1"
            else first_host(environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", ""))
        ),
    }  # fmt: skip
    begin, count = _PORTS
    job, step = (int(environ.get(name, "0")) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    found["MASTER_PORT"] = str(begin + (job + 7919 * step) % count)
    return {name: environ.get(name, value) for name, value in found.items()}


def first_host(hosts: str) -> str:
    """The first host of SLURM's short form: "gpu[003-005,9],login" -> "gpu003". Raises ValueError."""
    plain = r"[^\[\],\s]"  # what a name is made of; brackets hold numbers and ranges of them
    match = re.match(rf"({plain}+)(?=,|$)|({plain}*)\[([^\[\],-]+)[^\[\]]*\]({plain}*)(?=,|$)", hosts)
    if match is None:
        raise ValueError(
            f"the first host of SLURM's list {hosts!r} cannot be read: set MASTER_ADDR to the host of rank 0, e.g. "
            "export MASTER_ADDR=$(scontrol show hostnames $SLURM_JOB_NODELIST | head -n 1)"
        )
    whole, prefix, number, suffix = match.groups()
    return whole or f"{prefix}{number}{suffix}"


def same_rank(local: int | None, environ: Mapping[str, str]) -> None:
    """ValueError where the --local_rank of DeepSpeed's launcher is not the LOCAL_RANK that it sets, which is read."""
    if local is not None and environ.get("LOCAL_RANK") != str(local):
        raise ValueError(
            f"--local_rank={local}, but LOCAL_RANK={environ.get('LOCAL_RANK')}: leave the option to its launcher, "
            "DeepSpeed's"
        )
