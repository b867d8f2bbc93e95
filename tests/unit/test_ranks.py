"""Ranks and meeting place from each launcher's variables, and what is told where they are incomplete."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_switchlora.config.errors import UserError
from megatron_switchlora.startup import launchers
from megatron_switchlora.startup.environment import (
    RankError,
    Ranks,
    complete_environment,
    cpu_threads,
    discover_ranks,
    meeting_place,
    tasks_on_node,
)
from megatron_switchlora.startup.launchers import HYDRA as HYDRA_MPI
from megatron_switchlora.startup.launchers import LAUNCHERS, RESERVED_STEPS, host_names, is_first, slurm_host
from tests.dist.launch import clean_environment

Env = dict[str, str]
# What each launcher sets on one of several ranks, and Slurm without srun: in a batch script and in salloc's shell.
TORCH = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a"}
TORCH["MASTER_PORT"] = "1"
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "PMIX_NAMESPACE": "prterun-n1-77@1", "PMIX_RANK": "1",
}  # fmt: skip
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2", "PMI_FD": "11"}
JOB = {"SLURM_JOB_ID": "42", "SLURM_NTASKS": "7", "SLURM_TASKS_PER_NODE": "2(x3),1"}
JOB |= {"SLURM_JOB_NODELIST": "gpu[007-009,12]"}
BATCH = {**JOB, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
SALLOC = {**BATCH, "SLURM_STEP_ID": "4294967290", "SLURM_STEP_TASKS_PER_NODE": "1"}
SLURM = {
    **JOB, "SLURM_STEP_ID": "0", "SLURM_PROCID": "6", "SLURM_LOCALID": "0", "SLURM_NODEID": "3",
    "SLURM_STEP_NODELIST": "gpu[007-009,12]", "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
}  # fmt: skip


def without(env: Env, *names: str) -> Env:
    return {name: value for name, value in env.items() if name not in names}


def completed(env: Env) -> Env:
    """What torch finds afterwards; discover_ranks reads the same from it again."""
    found, ranks = dict(env), discover_ranks(env)
    complete_environment(found)
    assert discover_ranks(found) == ranks
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {name: found[name] for name in names}


@pytest.mark.parametrize(
    ("env", "ranks"),
    [
        ({}, Ranks()),
        ({"MASTER_ADDR": "a", "MASTER_PORT": "x"}, Ranks()),
        (TORCH, Ranks(3, 4, 1, 2)),
        ({**without(TORCH, "LOCAL_WORLD_SIZE"), "LOCAL_SIZE": "3"}, Ranks(3, 4, 1, 3)),
        (without(TORCH, "LOCAL_WORLD_SIZE"), Ranks(3, 4, 1, 4)),
        ({**TORCH, **HYDRA, **OPEN_MPI, **SLURM}, Ranks(3, 4, 1, 2)),  # torchrun within the others
        (OPEN_MPI, Ranks(1, 2, 1, 2)),
        ({**OPEN_MPI, **SLURM, "SLURM_NTASKS": "1"}, Ranks(1, 2, 1, 2)),  # in a batch job, through srun's helpers
        (HYDRA, Ranks(1, 2, 1, 2)),
        ({**HYDRA, **BATCH}, Ranks(1, 2, 1, 2)),
        ({**HYDRA, **SLURM, "SLURM_NTASKS": "1"}, Ranks(1, 2, 1, 2)),
        (SLURM, Ranks(6, 7, 0, 1)),
        ({**SLURM, "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1"}, Ranks(3, 7, 1, 2)),
        (without(SLURM, "SLURM_STEP_TASKS_PER_NODE"), Ranks(6, 7, 0, 1)),
        ({**SLURM, "SLURM_TASKS_PER_NODE": "9"}, Ranks(6, 7, 0, 1)),  # the job's, the step has its own
        ({**SLURM, "PMI_RANK": "6", "PMI_SIZE": "7", "PMI_FD": "9"}, Ranks(6, 7, 0, 1)),  # srun --mpi=pmi2
        ({**BATCH, "SLURM_NTASKS": "1", "SLURM_TASKS_PER_NODE": "1"}, Ranks()),
        (without(BATCH, "SLURM_NTASKS"), Ranks()),  # sbatch without -n
        ({**SALLOC, "SLURM_NTASKS": "1"}, Ranks()),
    ],
)
def test_ranks(env: Env, ranks: Ranks) -> None:
    assert discover_ranks(env) == ranks
    assert is_first(env) == (ranks.rank == 0)


@pytest.mark.parametrize(
    ("env", "message"),
    [
        (without(TORCH, "MASTER_ADDR"), "found RANK=3, .* but not MASTER_ADDR: start with"),
        (without(TORCH, "RANK"), "found WORLD_SIZE=4.* but not RANK"),
        ({"WORLD_SIZE": "7", **SLURM}, "deepspeed or torchrun must set all .* found WORLD_SIZE=7 but not RANK"),
        ({**TORCH, "RANK": "x"}, "RANK must be a whole number, but it is 'x'"),
        ({**TORCH, "LOCAL_WORLD_SIZE": "x"}, "LOCAL_WORLD_SIZE must be a whole number"),
        ({**TORCH, "MASTER_PORT": "http"}, "MASTER_PORT must be a whole number"),
        ({**TORCH, "MASTER_PORT": "70000"}, "MASTER_PORT must lie between 1 and 65535, but it is 70000"),
        (without(OPEN_MPI, "OMPI_COMM_WORLD_RANK"), "but not OMPI_COMM_WORLD_RANK"),
        ({"OMPI_COMM_WORLD_LOCAL_RANK": "0"}, "Open MPI's mpirun must set all"),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "two"}, "OMPI_COMM_WORLD_SIZE must be a whole number, but it is 'two'"),
        (without(HYDRA, "PMI_RANK"), "found PMI_SIZE=2, .* but not PMI_RANK"),
        (without(HYDRA, "MPI_LOCALRANKID", "MPI_LOCALNRANKS"), "but not MPI_LOCALRANKID, MPI_LOCALNRANKS"),
        ({"MPI_LOCALRANKID": "0"}, "but not PMI_RANK, PMI_SIZE, MPI_LOCALNRANKS"),
        ({**HYDRA, "PMI_RANK": ""}, "PMI_RANK must be a whole number, but it is ''"),
        (without(SLURM, "SLURM_NTASKS"), "found SLURM_PROCID=6, .* but not SLURM_NTASKS: start with"),
        (without(SLURM, "SLURM_PROCID"), "but not SLURM_PROCID"),
        (without(SLURM, "SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"), "but not SLURM_STEP_TASKS_PER_NODE"),
        ({"SLURM_PROCID": "0"}, "found SLURM_PROCID=0 but not SLURM_NTASKS, SLURM_LOCALID, SLURM_STEP_ID"),
        ({"SLURM_PROCID": "1", "SLURM_JOB_ID": "42"}, "found SLURM_PROCID=1 without an srun step's SLURM_STEP_ID"),
        ({**SLURM, "SLURM_NODEID": "a"}, "SLURM_NODEID must be a whole number"),
        ({**SLURM, "SLURM_NODEID": "4"}, "must have an entry for SLURM_NODEID 4 .* '2\\(x3\\),1': start with srun"),
        ({**SLURM, "SLURM_NTASKS": "8"}, "add up to SLURM_NTASKS 8, but it is '2\\(x3\\),1'"),
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "2(x"}, "it is '2\\(x'"),
        (BATCH, "found SLURM_PROCID=0, SLURM_NTASKS=7, .*: put srun before python, or srun -n 1"),
        (SALLOC, "found SLURM_PROCID=0, SLURM_NTASKS=7, .*: put srun before python"),
        (JOB, "found SLURM_NTASKS=7, .* without an srun step"),
    ],
)
def test_incomplete_environments(env: Env, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        discover_ranks(env)
    assert not isinstance(caught.value, RankError)  # every rank has it, so rank 0 tells it
    with pytest.raises(UserError, match=message):
        complete_environment(dict(env))


@pytest.mark.parametrize(
    "env",
    [
        {**TORCH, "RANK": "4"},
        {**TORCH, "RANK": "-1"},
        {**TORCH, "LOCAL_RANK": "2"},
        {**TORCH, "LOCAL_WORLD_SIZE": "5"},
        {**OPEN_MPI, "OMPI_COMM_WORLD_RANK": "2"},
        {**HYDRA, "PMI_SIZE": "1", "MPI_LOCALNRANKS": "1"},
        {**SLURM, "SLURM_PROCID": "7"},
        {**SLURM, "SLURM_LOCALID": "1"},
    ],
)
def test_ranks_beyond_their_world_speak_for_themselves(env: Env) -> None:
    with pytest.raises(RankError, match=r"below their group's size, but .* gives Ranks\(.* correct "):
        discover_ranks(env)


@pytest.mark.parametrize(
    ("env", "first"),
    [
        ({"SLURM_PROCID": "0"}, True),
        ({"SLURM_PROCID": "1"}, False),
        ({"PMI_RANK": "1"}, False),
        ({"PMI_RANK": "1", "SLURM_PROCID": "0"}, False),  # mpirun's helper is srun's task 0
        ({"OMPI_COMM_WORLD_RANK": "0", "SLURM_PROCID": "1"}, True),
        ({"WORLD_SIZE": "2", "SLURM_PROCID": "1"}, False),
        ({"RANK": "x"}, True),
        ({"RANK": "-1"}, True),
        ({"PMI_SIZE": "2"}, True),  # nobody knows its rank: rather twice than never
    ],
)
def test_who_tells_a_mistake(env: Env, first: bool) -> None:
    assert is_first(env) == first


def test_meeting_place_on_one_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launchers.os, "getppid", lambda: 1)  # no helper of MPICH's mpirun above
    found = completed(OPEN_MPI)
    assert found["MASTER_ADDR"] == "127.0.0.1" and 20000 <= int(found.pop("MASTER_PORT")) < 32000
    assert found == {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"} | {
        "MASTER_ADDR": "127.0.0.1"
    }
    single = {"SLURM_NTASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_NODEID": "0", "SLURM_PROCID": "1"}
    assert completed({**SLURM, **single, "SLURM_LOCALID": "1"})["MASTER_ADDR"] == "127.0.0.1"
    with pytest.raises(UserError, match=r"nothing gives MASTER_PORT to rank 1 of mpirun, with 2 of 2 .*-genv"):
        complete_environment(dict(HYDRA))
    given = completed({**HYDRA, "MASTER_ADDR": "here", "MASTER_PORT": "5"})
    assert (given["MASTER_ADDR"], given["MASTER_PORT"]) == ("here", "5")
    alone = completed({**HYDRA, "PMI_RANK": "0", "PMI_SIZE": "1", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "1"})
    assert (alone["RANK"], alone["WORLD_SIZE"], alone["MASTER_ADDR"]) == ("0", "1", "127.0.0.1")


def test_meeting_place_across_hosts() -> None:
    found = completed(SLURM)
    assert found["MASTER_ADDR"] == "gpu007"
    assert (found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"], found["LOCAL_WORLD_SIZE"]) == ("6", "7", "0", "1")
    assert completed({**without(SLURM, "SLURM_STEP_NODELIST"), "SLURM_JOB_NODELIST": "n3"})["MASTER_ADDR"] == "n3"
    assert completed({**SLURM, "MASTER_ADDR": "mine"}) == {**found, "MASTER_ADDR": "mine"}
    assert completed({**SLURM, "MASTER_PORT": "77"}) == {**found, "MASTER_PORT": "77"}
    with pytest.raises(UserError, match=r"must read like n1,gpu\[001-003\], but it is 'n\[1-'"):
        complete_environment({**SLURM, "SLURM_STEP_NODELIST": "n[1-"})
    with pytest.raises(UserError, match=r"nothing gives MASTER_ADDR and MASTER_PORT to rank 6 of srun, with 1 of 7"):
        complete_environment(without(SLURM, "SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"))
    two_hosts = {**HYDRA, "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "1"}
    with pytest.raises(UserError, match=r"nothing gives MASTER_ADDR and MASTER_PORT .* 1 of 2 ranks on this host"):
        complete_environment(dict(two_hosts))
    assert completed({**two_hosts, "MASTER_ADDR": "n1", "MASTER_PORT": "9"})["MASTER_PORT"] == "9"
    with pytest.raises(UserError, match=r"nothing gives MASTER_PORT"):  # each host has its own helper
        meeting_place({"MASTER_ADDR": "n1"}, replace(HYDRA_MPI, key=lambda env: "pid"), Ranks(1, 2, 0, 1))
    open_mpi = {**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}
    with pytest.raises(UserError, match=r"nothing gives MASTER_ADDR to rank 1 of Open MPI's mpirun"):
        complete_environment(dict(open_mpi))
    assert completed({**open_mpi, "MASTER_ADDR": "n1"})["MASTER_PORT"] == completed(OPEN_MPI)["MASTER_PORT"]


def test_ports_are_the_same_for_a_start_and_differ_between_starts() -> None:
    other_rank = {"SLURM_PROCID": "0", "SLURM_NODEID": "0"}
    port = completed(SLURM)["MASTER_PORT"]
    assert completed({**SLURM, **other_rank})["MASTER_PORT"] == port
    starts = [{**SLURM, "SLURM_JOB_ID": str(j), "SLURM_STEP_ID": str(s)} for j in range(42, 47) for s in range(4)]
    ports = {completed(env)["MASTER_PORT"] for env in starts}
    assert len(ports) == 20 and port in ports
    old = {**without(OPEN_MPI, "PMIX_NAMESPACE"), "OMPI_MCA_ess_base_jobid": "5"}
    assert completed(old)["MASTER_PORT"] != completed(OPEN_MPI)["MASTER_PORT"]


@pytest.mark.parametrize(
    ("nodelist", "names"),
    [
        ("n1", "n1"),
        ("n[1-3,7]", "n1 n2 n3 n7"),
        ("gpu[001-003]", "gpu001 gpu002 gpu003"),
        ("a1,b[2-3]", "a1 b2 b3"),
        ("b[2,9-11],a1", "b2 b9 b10 b11 a1"),
        ("node-[09-10]-ib.example.org,x", "node-09-ib.example.org node-10-ib.example.org x"),
        ("r[1-2]n[03-04]", "r1n03 r1n04 r2n03 r2n04"),
    ],
)
def test_host_names(nodelist: str, names: str) -> None:
    assert host_names(nodelist) == names.split()
    assert slurm_host({"SLURM_JOB_NODELIST": nodelist}) == names.split()[0]


@pytest.mark.parametrize(
    "nodelist",
    ["", "n[", "n[1-3", "n[]", "n]1[", ",n1", "n1,,n2", "n1 n2", "n[a-b]", "n[3-1]", "n[1,4-2]", "user@n1", "fe80::1"],
)
def test_broken_list_of_hosts(nodelist: str) -> None:
    with pytest.raises(UserError, match="set MASTER_ADDR"):
        host_names(nodelist)


@pytest.mark.parametrize("address", ["n1,n2", "n[1-4]", "user@n1", "n1 "])
def test_rank_0_is_on_one_host(address: str) -> None:
    with pytest.raises(UserError, match="MASTER_ADDR must be the name or address of one host"):
        discover_ranks({**SLURM, "MASTER_ADDR": address})
    for fine in ("n-1.example.org", "10.0.0.1", "fe80::1%eth0"):
        assert discover_ranks({**SLURM, "MASTER_ADDR": fine})


@pytest.mark.parametrize(
    ("requested", "env", "threads", "source"),
    [(3, {"OMP_NUM_THREADS": "1"}, 3, "train.threads"), (0, {"OMP_NUM_THREADS": "1"}, 1, "OMP_NUM_THREADS"),
     (0, {"OMP_NUM_THREADS": "5,2"}, 5, "OMP_NUM_THREADS"), (0, {"MKL_NUM_THREADS": "7"}, 7, "MKL_NUM_THREADS"),
     (0, {"OMP_NUM_THREADS": "0", "MKL_NUM_THREADS": "many"}, 4, "the usable cores"), (0, {}, 4, "the usable cores")],
)  # fmt: skip
def test_threads(monkeypatch: pytest.MonkeyPatch, requested: int, env: Env, threads: int, source: str) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: range(8))
    assert cpu_threads(requested, 2, env) == (threads, source)


def test_tasks_on_each_node() -> None:
    assert [tasks_on_node("2(x3),1", node, 7) for node in range(4)] == [2, 2, 2, 1]
    assert [tasks_on_node("8,4(x2)", node, 16) for node in range(3)] == [8, 4, 4]
    for text in ("", "2(x3", "2x3", "(x2)", "2,", "-1,8"):
        with pytest.raises(UserError, match="SLURM_STEP_TASKS_PER_NODE must have"):
            tasks_on_node(text, 0, 7)


def test_reserved_steps_are_slurms_own() -> None:
    assert [hex(int(step)) for step in RESERVED_STEPS] == [f"0xfffffff{digit}" for digit in "fedcba"]


def test_the_tests_own_processes_see_no_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for each in LAUNCHERS for name in each.names()] + ["PMIX_NAMESPACE", "SLURM_JOB_ID"]:
        monkeypatch.setenv(name, "1")
    assert discover_ranks(clean_environment(tmp_path)) == Ranks()
    assert "SLURM_JOB_ID" not in clean_environment(tmp_path)
