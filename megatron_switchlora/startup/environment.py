"""Find out which process this is and where its world meets, from the environment that the launcher set.

launchers.py describes what launchers set. `complete_environment` writes the result under the names that torch and
deepspeed read. Without a launcher the process is alone: rank 0 of a world of one, which meets itself on a free port.
"""

from __future__ import annotations

import atexit
import os
import re
import socket
import sys
import zlib
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import NoReturn

from megatron_switchlora.config.errors import UserError, require
from megatron_switchlora.startup.launchers import SLURM, TORCH, Launcher, in_srun_step, which_launcher


class RankError(UserError):
    """A mistake that perhaps no other rank sees, so each rank that does reports it."""


@dataclass(frozen=True)
class Ranks:
    """Global and local position of this process."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_size: int = 1


def number(env: Mapping[str, str], name: str) -> int:
    """Return the whole number that a variable holds.

    Raises:
        UserError: it holds something else.
    """
    try:
        return int(env[name])
    except ValueError:
        raise UserError(
            f"{name} must be a whole number, but it is {env[name]!r}: leave it to the launcher, or correct it."
        ) from None


def require_all(env: Mapping[str, str], launcher: Launcher) -> None:
    """Require all variables of the launcher; those of Slurm must come from an srun step.

    Raises:
        UserError: some are missing, or no srun step set them.
    """
    names = launcher.names()
    missing = ", ".join(name for name in names if name not in env)
    present = ", ".join(f"{name}={env[name]}" for name in names if name in env)
    if launcher is SLURM and "SLURM_JOB_ID" in env and not in_srun_step(env):
        raise UserError(
            f"In a Slurm job of several tasks srun must start the ranks, but found {present} without an srun step's "
            "SLURM_STEP_ID: put srun before python, or srun -n 1 for one process."
        )
    require(
        not missing,
        f"{launcher.title} must set all of {', '.join(names)}; found {present} but not {missing}: start with "
        "deepspeed, torchrun, mpirun or srun and pass on all that it sets, or unset what was found.",
    )


def tasks_on_node(text: str, node: int, world: int) -> int:
    """Return the number of ranks on a node of Slurm's list: "2(x3),1" means 2, 2, 2, 1.

    Raises:
        UserError: the list does not match the node or the world.
    """
    counts: list[int] = []
    if re.fullmatch(r"\d+(\(x\d+\))?(,\d+(\(x\d+\))?)*", text):
        for entry in text.split(","):
            count, _, times = entry.rstrip(")").partition("(x")
            counts += [int(count)] * int(times or 1)
    require(
        0 <= node < len(counts) and sum(counts) == world,
        f"SLURM_STEP_TASKS_PER_NODE must have an entry for SLURM_NODEID {node} and add up to SLURM_NTASKS {world}, but "
        f"it is {text!r}: start with srun and pass on all that it sets.",
    )
    return counts[node]


def read_local_size(env: Mapping[str, str], launcher: Launcher, world: int) -> int:
    """Return how many ranks share this host."""
    if launcher is TORCH:  # torchrun's name, deepspeed's, or one host
        return next((number(env, name) for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if env.get(name)), world)
    if launcher is SLURM:
        return tasks_on_node(env["SLURM_STEP_TASKS_PER_NODE"], number(env, "SLURM_NODEID"), world)
    return number(env, launcher.others[0])


def discover_ranks(env: Mapping[str, str]) -> Ranks:
    """Read this process's position from the launcher's variables.

    Raises:
        UserError: only some of the variables are set, or they contradict one another.
    """
    launcher = which_launcher(env)
    if launcher is None:
        return Ranks()
    if "SLURM_TASKS_PER_NODE" in env:  # the older name
        env = {"SLURM_STEP_TASKS_PER_NODE": env["SLURM_TASKS_PER_NODE"], **env}
    require_all(env, launcher)
    if "MASTER_PORT" in env:
        port = number(env, "MASTER_PORT")
        require(0 < port < 65536, f"MASTER_PORT must lie between 1 and 65535, but it is {port}: give a free port.")
    address = env.get("MASTER_ADDR", "")
    require(
        re.fullmatch(r"[\w.:%-]*", address) is not None,
        f"MASTER_ADDR must be the name or address of one host, that of rank 0, but it is {address!r}: give that alone.",
    )
    world = number(env, launcher.size)
    local_size = read_local_size(env, launcher, world)
    ranks = Ranks(number(env, launcher.rank), world, number(env, launcher.local_rank), local_size)
    if not 0 <= ranks.rank < world or not 0 <= ranks.local_rank < local_size <= world:
        raise RankError(
            f"Ranks must lie below their group's size, but {launcher.title} gives {ranks}: start all ranks with one "
            f"launcher, or correct {', '.join(launcher.names()[:3])}."
        )
    return ranks


def meeting_place(env: Mapping[str, str], launcher: Launcher, ranks: Ranks) -> tuple[str, str]:
    """Return address and port of rank 0: as given, else as derived from what the launcher gives to all ranks.

    Raises:
        UserError: a rank cannot know.
    """
    one_host = ranks.local_size == ranks.world_size
    # 127.0.0.1 under srun too: a node's name in Slurm need not resolve.
    address = env.get("MASTER_ADDR") or ("127.0.0.1" if one_host else launcher.host(env))
    key = launcher.key(env) if one_host or launcher.key_spans_hosts else None
    # Fixed ports lie below those that the kernel gives out by itself, from 32768 on Linux.
    port = env.get("MASTER_PORT") or (key and str(20000 + zlib.crc32(key.encode()) % 12000))
    if address and port:
        return address, port
    lacking = " and ".join(name for name, value in (("MASTER_ADDR", address), ("MASTER_PORT", port)) if not value)
    raise UserError(
        f"Every rank must know where rank 0 listens, but nothing gives {lacking} to rank {ranks.rank} of "
        f"{launcher.title}, with {ranks.local_size} of {ranks.world_size} ranks on this host: give the host of rank 0 "
        "and a free port there, by mpirun -genv MASTER_ADDR node1 -genv MASTER_PORT 29500 (Open MPI: "
        "-x MASTER_ADDR=node1 -x MASTER_PORT=29500), or by export before srun."
    )


def meets_on_loopback(env: Mapping[str, str]) -> bool:
    """Return whether the ranks of a completed environment meet within this host, unreachable for others."""
    address = env["MASTER_ADDR"]
    return address == "localhost" or re.fullmatch(r"127(\.\d+){3}", address) is not None


def complete_environment(env: MutableMapping[str, str]) -> None:
    """Set the ranks and their meeting place under torch's names, where the launcher has not set them.

    Raises:
        UserError: as `discover_ranks` and `meeting_place`.
    """
    launcher, ranks = which_launcher(env), discover_ranks(env)
    if launcher is TORCH:
        return
    if launcher is not None and ranks.world_size > 1:
        address, port = meeting_place(env, launcher, ranks)
    else:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address, port = "127.0.0.1", str(probe.getsockname()[1])
    env.update(
        RANK=str(ranks.rank), WORLD_SIZE=str(ranks.world_size), LOCAL_RANK=str(ranks.local_rank),
        LOCAL_WORLD_SIZE=str(ranks.local_size), MASTER_ADDR=address, MASTER_PORT=port,
    )  # fmt: skip


def cpu_threads(requested: int, local_size: int, env: Mapping[str, str]) -> tuple[int, str]:
    """Return the CPU threads of one rank, and what set them.

    The option counts first, then the environment, then the usable cores divided by the local ranks.
    """
    if requested:
        return requested, "train.threads"
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        first = env.get(name, "").split(",")[0].strip()  # one number for each level of nesting
        if re.fullmatch(r"[0-9]{1,4}", first) and int(first):  # others OpenMP ignores, too
            return int(first), name
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return max(1, cores // local_size), "the usable cores"


def end_rank(status: int) -> NoReturn:
    """End this process now.

    At a regular exit gloo's threads sometimes abort the process when a peer is already gone.
    """
    atexit._run_exitfuncs()  # what libraries (W&B, TensorBoard) want to flush
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
