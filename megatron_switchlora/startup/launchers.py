"""What each launcher gives to a process, and which launcher started this process.

`LAUNCHERS` is in the order of recognition: deepspeed and torchrun, Open MPI's mpirun, MPICH's and Intel's mpirun, srun.
mpirun comes before srun: inside a Slurm job it starts its helpers through srun, and the ranks inherit their variables.

Only deepspeed and torchrun set the address of rank 0. Under the others each rank derives it from what its launcher
gives to all ranks alike. A broadcast by mpi4py was tried instead, and has two faults. Once MPI is initialised, the
mpirun of MPICH 5.0.2 ends all ranks with status 0 as soon as one leaves. And mpi4py would have to load the very MPI
that mpirun belongs to.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from megatron_switchlora.config.errors import UserError

# SLURM_STEP_ID of what no srun started: salloc's shell on a node, a batch script, ...
RESERVED_STEPS = [str(2**32 - below) for below in range(1, 7)]


def host_names(nodelist: str) -> list[str]:
    """Expand Slurm's compressed list of hosts: "gpu[001-002],login" becomes gpu001, gpu002, login.

    Raises:
        UserError: the list has another form.
    """
    name = r"(?:[\w.-]|\[\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*\])+"
    spans = re.findall(r"(?<![\w.-])(\d+)-(\d+)(?=[,\]])", nodelist)
    if not re.fullmatch(f"{name}(?:,{name})*", nodelist) or any(int(a) > int(b) for a, b in spans):
        raise UserError(
            f"Slurm's list of hosts must read like n1,gpu[001-003], but it is {nodelist!r}: set MASTER_ADDR to the "
            "host of rank 0."
        )
    return [host for each in re.findall(name, nodelist) for host in _expanded(each)]


def _expanded(name: str) -> list[str]:
    """Return every host that a name with brackets stands for."""
    before, bracket, rest = name.partition("[")
    if not bracket:
        return [name]
    inside, _, after = rest.partition("]")
    numbers = []
    for span in inside.split(","):
        first, _, last = span.partition("-")
        numbers += [str(number).zfill(len(first)) for number in range(int(first), int(last or first) + 1)]
    return [f"{before}{number}{tail}" for number in numbers for tail in _expanded(after)]


def slurm_hosts(env: Mapping[str, str]) -> list[str]:
    """Return the hosts of the step, else of the job."""
    nodelist = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST")
    return host_names(nodelist) if nodelist else []


def slurm_host(env: Mapping[str, str]) -> Optional[str]:
    """Return the first host of the step, where srun starts rank 0."""
    return next(iter(slurm_hosts(env)), None)


def expected_hosts(env: Mapping[str, str]) -> list[str]:
    """Return all hosts of this start, where known: from launch/mpi/pretrain.sh (LAUNCH_HOSTS) or from Slurm."""
    listed = env.get("LAUNCH_HOSTS")
    return [host for host in listed.split(",") if host] if listed else slurm_hosts(env)


def own_host(env: Mapping[str, str]) -> str:
    """Return this host's name, or Slurm's name for it where srun started the process."""
    return (in_srun_step(env) and env.get("SLURMD_NODENAME")) or socket.gethostname()


def slurm_key(env: Mapping[str, str]) -> Optional[str]:
    """Return the job and the step, as one key."""
    job, step = env.get("SLURM_JOB_ID"), env.get("SLURM_STEP_ID")
    return f"slurm {job}.{step}" if job and step else None


def open_mpi_key(env: Mapping[str, str]) -> Optional[str]:
    """Return the job's name: PMIx's, or that of Open MPI 4."""
    return env.get("PMIX_NAMESPACE") or env.get("OMPI_MCA_ess_base_jobid")


def hydra_key(env: Mapping[str, str]) -> Optional[str]:
    """Return the process id of the hydra_pmi_proxy above the ranks of a host.

    The parent itself may be a shell or a wrapper, one per rank.
    """
    pid = os.getppid()
    try:
        while pid > 1:
            name, rest = Path(f"/proc/{pid}/stat").read_text().split("(", 1)[1].rsplit(")", 1)
            if name == "hydra_pmi_proxy":
                return f"hydra {pid}"
            pid = int(rest.split()[1])
    except OSError:  # not Linux
        pass
    return None


def not_given(env: Mapping[str, str]) -> Optional[str]:
    """Return None: the launcher does not give this."""
    return None


@dataclass(frozen=True)
class Launcher:
    """Names of the variables that a launcher sets on every rank.

    Attributes:
        others: further variables that it sets and that are needed.
        host: reads the host of rank 0.
        key: reads what all ranks of one start share and no other start has.
        key_spans_hosts: whether the key is the same on all hosts.
    """

    title: str
    rank: str
    size: str
    local_rank: str
    others: tuple[str, ...]
    host: Callable[[Mapping[str, str]], Optional[str]] = not_given
    key: Callable[[Mapping[str, str]], Optional[str]] = not_given
    key_spans_hosts: bool = True

    def names(self) -> tuple[str, ...]:
        return (self.rank, self.size, self.local_rank, *self.others)

    def found_in(self, env: Mapping[str, str]) -> bool:
        """Return whether any of its variables are set."""
        return any(name in env for name in self.names())


TORCH = Launcher("deepspeed or torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", ("MASTER_ADDR", "MASTER_PORT"))
OPEN_MPI = Launcher(
    "Open MPI's mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
    ("OMPI_COMM_WORLD_LOCAL_SIZE",), key=open_mpi_key,
)  # fmt: skip
HYDRA = Launcher(  # the process manager of MPICH and Intel MPI
    "mpirun", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", ("MPI_LOCALNRANKS",), key=hydra_key, key_spans_hosts=False
)
SLURM = Launcher(
    "srun", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID",
    ("SLURM_STEP_ID", "SLURM_NODEID", "SLURM_STEP_TASKS_PER_NODE"), slurm_host, slurm_key,
)  # fmt: skip
LAUNCHERS = (TORCH, OPEN_MPI, HYDRA, SLURM)


def in_srun_step(env: Mapping[str, str]) -> bool:
    """Return whether srun started this process.

    A batch script and salloc's shell have the job's variables without a step.
    """
    return "SLURM_STEP_ID" in env and env["SLURM_STEP_ID"] not in RESERVED_STEPS


def slurm_counts(env: Mapping[str, str]) -> bool:
    """Return whether Slurm's variables mean more than "one process in a job of one task".

    Without an srun step one process may run in a job of one task (NTASKS 1 or unset, PROCID 0 or unset). In a job of
    several tasks it is refused later: whoever reserved them meant to use them, and would notice after hours.
    """
    task = env.get("SLURM_PROCID")
    one_task = env.get("SLURM_NTASKS", "1") == "1" and (task is None or (task == "0" and "SLURM_JOB_ID" in env))
    return in_srun_step(env) or not one_task


def which_launcher(env: Mapping[str, str]) -> Optional[Launcher]:
    """Return the launcher whose variables count, complete or not; None for a process alone."""
    if "RANK" in env or "WORLD_SIZE" in env:  # MASTER_ADDR and MASTER_PORT go with every launcher
        return TORCH
    if OPEN_MPI.found_in(env):
        return OPEN_MPI
    # srun --mpi=pmi2 sets PMI_RANK and PMI_SIZE too, but not the local ones.
    by_srun = in_srun_step(env) and "MPI_LOCALRANKID" not in env
    if HYDRA.found_in(env) and not by_srun:
        return HYDRA
    return SLURM if slurm_counts(env) else None


def is_first(env: Mapping[str, str]) -> bool:
    """Return whether this process speaks for all: rank 0, or any process whose rank cannot be read."""
    return _is_zero(next((env[each.rank] for each in LAUNCHERS if each.rank in env), "0"))


def is_first_here(env: Mapping[str, str]) -> bool:
    """Return whether this process speaks for its host: local rank 0, or any whose local rank cannot be read."""
    return _is_zero(next((env[each.local_rank] for each in LAUNCHERS if each.local_rank in env), "0"))


def _is_zero(text: str) -> bool:
    """Return whether a text is zero, or no number."""
    return not text.isdecimal() or int(text) == 0
