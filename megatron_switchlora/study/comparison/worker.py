"""A process of tools/compare.py --batch: it trains one run after the other, as launch/pretrain.py alone would.

It imports torch and deepspeed once. Its input has one JSON object per run: the `words` of its command line, the `cache`
folder of its tokens and the `folder` where it is to lie. It answers each with one: the run's figures, or why it has
`failed`. When its input ends, the process that started it is gone, so it ends at once. What runs print goes to its log.
"""

from __future__ import annotations

import gc
import json
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist

from megatron_switchlora.config.command_line import parse_arguments
from megatron_switchlora.config.errors import UserError
from megatron_switchlora.data.packing import open_prepared
from megatron_switchlora.run.folder import read_meta
from megatron_switchlora.startup.device import choose_device
from megatron_switchlora.startup.door import Door, settle
from megatron_switchlora.startup.environment import Ranks
from megatron_switchlora.startup.signals import StopRequest
from megatron_switchlora.study.comparison.runner import DIVERGED, read_run
from megatron_switchlora.train.pretrain import run

ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
ALONE |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}  # named, never opened: a process alone listens to nobody


def perform(words: Sequence[str], cache: Path, folder: Path) -> dict[str, Any]:
    """Train a run in a new folder, and return its figures with the `wall` seconds that it took.

    Raises:
        UserError: what launch/pretrain.py would refuse.
    """
    began, diverged = time.perf_counter(), False
    try:
        arguments = parse_arguments([*words, "--output_dir", str(folder)])
        run(arguments, Ranks(), StopRequest(), Door(), open_prepared(cache))
    except UserError as error:
        if not any(sentence in str(error) for sentence in DIVERGED):
            raise
        diverged = True
    finally:
        clean_up()
    figures = read_run(folder, diverged)
    if figures["device"] == "cpu":
        figures["peak_memory_bytes"] = None  # the system's is that of all runs of this process so far
    return figures | {"versions": packages(folder), "wall": time.perf_counter() - began}


def packages(folder: Path) -> dict[str, str]:
    """Return what a run was computed with, by name; its revision and machine are kept separately."""
    versions = read_meta(folder).get("versions", {})
    return {name: value for name, value in versions.items() if value and name not in ("git_revision", "platform")}


def clean_up() -> None:
    """Leave nothing of a run to the next one."""
    if dist.is_initialized():
        dist.destroy_process_group()
    gc.collect()  # DeepSpeed's hooks hold an engine in cycles
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def answer(line: str) -> dict[str, Any]:
    """Return the figures of a run, or why it failed; after an unknown error `broken` is true."""
    task = json.loads(line)
    try:
        return perform(task["words"], Path(task["cache"]), Path(task["folder"]))
    except UserError as error:
        return {"failed": str(error)}
    except Exception:
        return {"failed": traceback.format_exc()[-2000:], "broken": True}


def lines_of(tasks: TextIO) -> queue.Queue[str]:
    """Read in a thread, which ends the process with its input."""
    lines: queue.Queue[str] = queue.Queue()

    def read() -> None:
        for line in tasks:
            lines.put(line)
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    return lines


def main(requested: str) -> None:
    """Answer until the input ends; first with the device, for which `requested` is train.device."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    lines = lines_of(sys.stdin)
    os.environ.update(ALONE)
    settle(first=False)
    device = choose_device(requested, Ranks(), 0)
    import megatron_switchlora.train.engine  # noqa: F401  # seconds, before the first run's clock

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    print(json.dumps({"device": name}), file=replies)
    while True:
        reply = answer(lines.get())
        print(json.dumps(reply), file=replies, flush=True)
        if "broken" in reply:
            os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1])
