"""launch/pretrain.py in a process that does something to itself at a chosen point, the count-th arrival there:
KILL_AT="point:count". KILL_BY says what: a signal, by default SIGKILL, a sleep, or an error that it raises.

Points lie in the data, the switch, the optimizer step, the evaluation and the record, and before, between and after all
that a save does.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import time
from typing import Any

from megatron_switchlora.config.errors import UserError
from tests.dist.launch import REPOSITORY

POINTS = {
    "data": ("megatron_switchlora.data.loader", "ReadAhead.micro_batches"),
    "switch": ("megatron_switchlora.lowrank.bank", "CandidateBank.put_back"),
    "step": ("megatron_switchlora.optim.row_adamw", "RowAdamW.step"),
    "evaluate": ("megatron_switchlora.train.engine", "Engine.evaluate"),
    "record": ("megatron_switchlora.run.folder", "RunFolder.log"),
    "save": ("megatron_switchlora.checkpoint.saver", "Saver.save"),
    "write": ("megatron_switchlora.checkpoint.saver", "write_slices"),
    "between files": ("megatron_switchlora.checkpoint.saver", "make_durable"),
    "describe": ("megatron_switchlora.checkpoint.saver", "describe"),
    "gather": ("megatron_switchlora.checkpoint.saver", "Saver.finish"),
    "publish": ("megatron_switchlora.checkpoint.saver", "publish"),
    "manifest": ("megatron_switchlora.checkpoint.files", "make_durable"),
    "prune": ("megatron_switchlora.checkpoint.saver", "prune"),
    "delete": ("megatron_switchlora.checkpoint.files", "shutil.rmtree"),
    "load": ("megatron_switchlora.checkpoint.archive", "Archive.fill"),
    "reopen": ("megatron_switchlora.run.metrics_log", "replace_text"),
}
RANK_0_ONLY = {"between files", "publish", "manifest", "prune", "delete", "reopen"}


def strike(what: str) -> None:
    if what.startswith("SIG"):
        os.kill(os.getpid(), signal.Signals[what])
    elif what.startswith("sleep "):
        time.sleep(float(what.split()[1]))
    else:
        raise {
            "TypeError": TypeError("struck"),
            "MemoryError": MemoryError("struck"),
            "UserError": UserError("struck"),
            "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp:116] DefaultCPUAllocator: can't allocate memory"),
        }[what]


def arm(point: str, count: int) -> None:
    """Replace the point's function by one that kills at its count-th call."""
    module, _, dotted = POINTS[point][0], None, POINTS[point][1]
    owner: Any = __import__(module, fromlist=["_"])
    *path, name = dotted.split(".")
    for part in path:
        owner = getattr(owner, part)
    original, calls = getattr(owner, name), 0

    def deadly(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            strike(os.environ.get("KILL_BY", "SIGKILL"))
        return original(*args, **kwargs)

    setattr(owner, name, deadly)


if __name__ == "__main__":
    if os.environ.get("KILL_AT"):
        where, number = os.environ["KILL_AT"].split(":")
        arm(where, int(number))
    script = str(REPOSITORY / "launch" / "pretrain.py")
    sys.argv = [script, *sys.argv[1:]]
    runpy.run_path(script, run_name="__main__")
