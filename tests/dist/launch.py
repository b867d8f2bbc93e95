"""Start a few ranks of a test worker, each with one thread, on their own port, under a time-out.

`run_ranks(world, "tests.dist.some_worker", payload)` calls the module's `act(payload)` on every rank, waits, and
returns what each rank's `act` returned, by way of JSON. Whatever happens, the processes it started are gone when
it returns, ended by their ids.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

REPOSITORY = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def clean_environment(scratch: Path) -> dict[str, str]:
    """The environment without a launcher's variables, with one thread and private extension builds."""
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_SIZE", "LOCAL_WORLD_SIZE")
    families = ("SLURM_", "OMPI_", "PMI_", "PMIX_", "MPI_LOCAL", "HYDI_")
    env = {key: value for key, value in os.environ.items() if key not in launcher and not key.startswith(families)}
    env.update(
        OMP_NUM_THREADS="1",
        TOKENIZERS_PARALLELISM="true",
        TORCH_EXTENSIONS_DIR=str(scratch / "extensions"),
        HF_HUB_OFFLINE="1",
        PYTHONPATH=str(REPOSITORY),
    )
    return env


def descendants(pid: int) -> list[int]:
    """Processes, not yet ended, that `pid` started, and those started by them (torchrun's have their own sessions)."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
                if fields[0] != "Z":
                    parents.setdefault(int(fields[1]), []).append(int(entry.name))
    found, queue = [], [pid]
    while queue:
        children = parents.get(queue.pop(), [])
        found += children
        queue += children
    return found


def end(processes: list[subprocess.Popen]) -> None:
    """Kill what was started here, by id, and reap it."""
    for process in processes:
        if process.poll() is None:
            for pid in [process.pid, *descendants(process.pid)]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        process.wait()


def end_ranks(ranks: list[Any]) -> None:
    """Kill what is left of them, and what they started, and reap it."""
    for rank in ranks:
        if rank.is_alive():
            for pid in [*descendants(rank.pid), rank.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        rank.join()


def run_ranks(world: int, module: str, payload: dict[str, Any], timeout: float = 240) -> list[Any]:
    """Call `module`'s `act(payload)` on `world` ranks; returns their results in rank order.

    Raises:
        AssertionError: a rank failed or the time ran out; the message has the end of the outputs.
    """
    with tempfile.TemporaryDirectory() as name:
        scratch, address = Path(name), {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        ranks = []
        try:
            for rank in range(world):
                places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
                env = {**clean_environment(scratch), **address, **{key: str(value) for key, value in places.items()}}
                ranks.append(warm_interpreters().Process(target=rank_main, args=(module, payload, scratch, rank, env)))
                ranks[-1].start()
            deadline = time.monotonic() + timeout
            while any(rank.is_alive() for rank in ranks) and not any(rank.exitcode for rank in ranks):
                if time.monotonic() > deadline:
                    break
                time.sleep(0.1)
            time.sleep(0.5 if any(rank.is_alive() for rank in ranks) else 0)
            codes = [rank.exitcode for rank in ranks]
        finally:
            end_ranks(ranks)
        outputs = "\n".join(f"--- rank {r}\n" + (scratch / f"out{r}").read_text()[-4000:] for r in range(world))
        assert codes == [0] * world, f"{module} on {world} ranks ended with {codes} (None: time-out)\n{outputs}"
        return [json.loads((scratch / f"result{rank}.json").read_text()) for rank in range(world)]


def run_scripts(
    script: Path, words: list[str], envs: list[dict[str, str]], folder: Path, timeout: float
) -> tuple[list[int], str]:
    """`python script words` in `folder` on the CPU, at once for every environment, without the seconds of its imports:
    exit statuses and all outputs.

    Raises:
        AssertionError: the time ran out; the message has the outputs.
    """
    with tempfile.TemporaryDirectory() as name:
        outputs = [Path(name) / str(number) for number in range(len(envs))]
        started: list[Any] = []
        try:
            for output, env in zip(outputs, envs, strict=True):
                output.touch()
                given = (script, words, folder, output, {**env, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""})
                process = warm_interpreters().Process(target=script_main, args=given)
                process.start()
                started.append(process)
            statuses = join_all(started, timeout)
        finally:
            end_ranks(started)
        text = "".join(output.read_text(errors="replace") for output in outputs)
        assert None not in statuses, f"{script.name} ran longer than {timeout} s: {statuses}\n{text}"
        return statuses, text


def join_all(started: list[Any], timeout: float) -> list[Any]:
    """Exit codes when all have ended, or the time has run out (None)."""
    deadline = time.monotonic() + timeout
    for process in started:
        process.join(max(0.0, deadline - time.monotonic()))
    return [process.exitcode for process in started]


def warm_interpreters() -> Any:
    """Where ranks are forked from: a process of Python's own that has imported torch and deepspeed, which takes longer
    than most cases."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.dist.preload"])
    return context


def stand_alone(output: Path, env: dict[str, str]) -> None:
    """Make a forked process like one that was started: its own environment, session and output file."""
    os.setsid()
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: killed tests take their ranks with them
    out = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    # else the server, which ends when nobody holds this, would outlive killed tests as long as this process runs
    os.close(forkserver._forkserver._forkserver_alive_fd)  # type: ignore[attr-defined]
    os.environ.clear()
    os.environ.update(env)
    os.umask(int(env.get("UMASK", "022"), 8))
    torch.set_num_threads(1)


def script_main(script: Path, words: list[str], folder: Path, output: Path, env: dict[str, str]) -> None:
    """A script's process."""
    stand_alone(output, env)
    os.chdir(folder)
    sys.argv = [str(script), *words]
    sys.path[:0] = [str(script.parent), str(script.parents[1])]  # the package beside the script, whatever is installed
    if not script.is_relative_to(REPOSITORY):
        forget_package()
    runpy.run_path(str(script), run_name="__main__")


def forget_package() -> None:
    """Let the package be imported anew: what `preload` has imported is this tree's."""
    for name in [*sys.modules]:
        if name.split(".")[0] == "megatron_switchlora":
            del sys.modules[name]


def rank_main(module: str, payload: dict[str, Any], scratch: Path, rank: int, env: dict[str, str]) -> None:
    """A rank's process. It ends without the interpreter's end, in which gloo's threads can abort."""
    stand_alone(scratch / f"out{rank}", env)
    result = importlib.import_module(module).act(payload)
    (scratch / f"result{rank}.json").write_text(json.dumps(result))
    if dist.is_initialized():  # leave together: a rank that ends while others talk can make gloo abort
        dist.barrier()
        dist.destroy_process_group()
