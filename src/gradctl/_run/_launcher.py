"""Which rank of a launched job this process is, read from what launchers leave in the environment."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass

_RANK_VARIABLES = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
)


@dataclass(frozen=True, slots=True)
class Rank:
    """One process of a launched job.

    Args:
        rank: number of this process in the job.
        world_size: number of processes in the job.
        node: number of this host in the job; hosts keep run directories of their own.
        restart: how often the launcher has started the job again.
        launch: a text that is equal in the ranks of one launch on one host and in no others; None without a launcher.
        draws: whether this rank draws the report of its host's run directory.
    """

    rank: int = 0
    world_size: int = 1
    node: int = 0
    restart: int = 0
    launch: str | None = None
    draws: bool = True


def find(environment: Mapping[str, str]) -> Rank:
    """Return which rank this process is; rank 0 of 1 without a launcher."""
    for rank_name, size_name, local_name, local_size_name in _RANK_VARIABLES:
        rank, size = _number(environment, rank_name), _number(environment, size_name)
        if rank is None or size is None or not 0 <= rank < size:
            continue
        restart = _number(environment, "TORCHELASTIC_RESTART_COUNT") or 0
        if size == 1:
            return Rank(restart=restart)
        local = _number(environment, local_name)
        local_size = _number(environment, local_size_name)
        node = _number(environment, "GROUP_RANK")
        if node is None:
            node = _number(environment, "SLURM_NODEID")
        if node is None:
            node = rank // local_size if local_size else 0
        return Rank(
            rank=rank,
            world_size=size,
            node=node,
            restart=restart,
            launch=_launch(environment, rank_name),
            draws=rank == 0 if local is None else local == 0,
        )
    return Rank()


def _launch(environment: Mapping[str, str], rank_name: str) -> str:
    """Name this launch on this host, without asking the other ranks.

    The launcher is the nearest ancestor that was not itself started as a rank; its process id and start time are the
    same for all ranks of a launch and differ between launches, which the rendezvous address alone does not.
    """
    facts = [platform.node(), *_ancestor(rank_name)]
    facts += [
        environment.get(name, "")
        for name in ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT", "SLURM_JOB_ID", "SLURM_STEP_ID")
    ]
    return hashlib.sha256("\0".join(facts).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _ancestor(rank_name: str) -> tuple[str, str]:
    mark = f"{rank_name}=".encode()
    pid = os.getppid()
    for _ in range(20):
        try:
            with open(f"/proc/{pid}/environ", "rb") as file:
                is_rank = any(entry.startswith(mark) for entry in file.read().split(b"\0"))
        except OSError:
            is_rank = False  # another user's: a daemon of the launcher
        try:
            with open(f"/proc/{pid}/stat", "rb") as file:
                fields = file.read().rpartition(b")")[2].split()
        except OSError:
            return str(pid), ""
        if not is_rank or pid <= 1:
            return str(pid), fields[19].decode()
        pid = int(fields[1])
    return str(pid), ""


def _number(environment: Mapping[str, str], name: str) -> int | None:
    try:
        return int(environment[name])
    except (KeyError, ValueError):
        return None
