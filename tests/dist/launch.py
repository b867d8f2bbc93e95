"""Start a few ranks of a test worker, each with one thread, on their own port, under a time-out.

`run_ranks(world, "tests.dist.some_worker", payload)` runs `python -m` on every rank with the payload as
JSON, waits, and returns what each rank wrote as JSON. Whatever happens, the processes it started are gone
when it returns, ended by their ids.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

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


def run_ranks(world: int, module: str, payload: dict[str, Any], timeout: float = 240) -> list[Any]:
    """Run `module` on `world` ranks; returns their results in rank order.

    Raises:
        AssertionError: a rank failed or the time ran out; the message has the end of the outputs.
    """
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        (scratch / "payload.json").write_text(json.dumps(payload))
        env = clean_environment(scratch)
        env.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), WORLD_SIZE=str(world))
        processes = []
        try:
            for rank in range(world):
                with open(scratch / f"out{rank}", "w") as out:
                    processes.append(
                        subprocess.Popen(
                            [sys.executable, "-m", module, str(scratch)],
                            env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world)},
                            cwd=REPOSITORY, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
                        )  # fmt: skip
                    )
            deadline = time.monotonic() + timeout
            while any(p.poll() is None for p in processes) and not any(p.poll() for p in processes):
                if time.monotonic() > deadline:
                    break
                time.sleep(0.1)
            time.sleep(0.5 if any(p.poll() is None for p in processes) else 0)
            codes = [p.poll() for p in processes]
        finally:
            end(processes)
        outputs = "\n".join(f"--- rank {r}\n" + (scratch / f"out{r}").read_text()[-4000:] for r in range(world))
        assert codes == [0] * world, f"{module} on {world} ranks ended with {codes} (None: time-out)\n{outputs}"
        return [json.loads((scratch / f"result{rank}.json").read_text()) for rank in range(world)]


def worker_main(act: Any) -> None:
    """Body of a worker module: `act(payload)` returns this rank's result."""
    scratch = Path(sys.argv[1])
    result = act(json.loads((scratch / "payload.json").read_text()))
    (scratch / f"result{os.environ['RANK']}.json").write_text(json.dumps(result))
    if dist.is_initialized():  # leave together: a rank that ends while others talk can make gloo abort
        dist.barrier()
        dist.destroy_process_group()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(0)  # as launch/pretrain.py does: threads of gloo may abort while the interpreter ends
