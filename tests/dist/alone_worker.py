"""One rank alone: where it listens, and how long its process groups wait."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_switchlora.distributed.alone import Alone
from tests.dist.engines import build_engine, start
from tests.plain import small_config


def listening() -> list[str]:
    """Addresses, as the kernel writes them, on which this process listens."""
    mine = {str(path.readlink()) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()}
    rows = [line.split() for kind in ("tcp", "tcp6") for line in Path("/proc/net", kind).read_text().splitlines()[1:]]
    return [row[1].split(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in mine]


def act(payload: dict[str, Any]) -> dict[str, Any]:
    os.environ.pop("LOCAL_WORLD_SIZE")
    mesh = start()
    config = small_config(parallel__timeout=payload["timeout"])
    build_engine(config, "1", mesh)
    every = [group for group in dist.distributed_c10d._world.pg_map if isinstance(group, dist.ProcessGroup)]
    groups = [group for group in every if not isinstance(group, Alone)]  # a group of one rank waits for nobody
    waits = [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]
    return {"listening": listening(), "waits": waits}
