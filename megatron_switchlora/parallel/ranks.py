"""Which process is this? Read once, from the environment that the launcher left.

`deepspeed` and `torchrun` set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; the size
of the local group is LOCAL_SIZE or LOCAL_WORLD_SIZE. With none of them set the process is alone:
rank 0 of a world of one, meeting itself on a free port.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from megatron_switchlora.config import UserError


@dataclass(frozen=True)
class Ranks:
    """Global and local position of this process."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_size: int = 1


def discover_ranks(env: Mapping[str, str]) -> Ranks:
    """Read the launcher's variables.

    Raises:
        UserError: only some of the variables are set, or they contradict one another.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    present = [name for name in names if name in env]
    if "RANK" not in env and "WORLD_SIZE" not in env:
        other = next(
            (n for n in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_NTASKS") if int(env.get(n) or 1) > 1), None
        )
        if other:
            raise UserError(
                f"{other} is {env[other]}, but RANK and WORLD_SIZE are not set: mpirun and srun are not supported yet, "
                "so start with deepspeed or torchrun."
            )
        return Ranks()
    missing = [name for name in names if name not in env]
    if missing:
        raise UserError(
            f"A launcher must set all of {', '.join(names)}; found {', '.join(present)} but not {', '.join(missing)}: "
            "start with deepspeed or torchrun, or unset them to run alone."
        )
    try:
        world = int(env["WORLD_SIZE"])
        local_size = int(env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE") or world)
        ranks = Ranks(int(env["RANK"]), world, int(env["LOCAL_RANK"]), local_size)
    except ValueError as error:
        raise UserError(f"RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE must be whole numbers: {error}.") from None
    if not 0 <= ranks.rank < ranks.world_size or not 0 <= ranks.local_rank < ranks.local_size:
        raise UserError(f"Ranks must lie below their group's size, but the environment says {ranks}.")
    return ranks


def complete_environment(env: MutableMapping[str, str]) -> None:
    """Set the variables of a lone process where no launcher has, with a port that is free now."""
    if "RANK" in env:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def cpu_threads(requested: int, local_size: int) -> int:
    """CPU threads of one rank: as requested, else the usable cores divided by the local ranks."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return requested or max(1, cores // local_size)
