"""Engines, clocks around methods, facts of the machine and output, for all benchmarks."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

import torch

from megatron_switchlora.config.ds_config import read_ds_config, resolve_ds_config
from megatron_switchlora.config.run import RunConfig
from megatron_switchlora.methods import build_method
from megatron_switchlora.model.protocol import build_model, initialize_weights
from megatron_switchlora.run.machine import machine, versions
from megatron_switchlora.startup.device import choose_device
from megatron_switchlora.startup.environment import Ranks, discover_ranks

if TYPE_CHECKING:
    from megatron_switchlora.train.engine import Engine


def join_ranks(kind: str, threads: int = 0) -> tuple[Ranks, torch.device]:
    """Join the launcher's ranks on a device of this kind."""
    ranks = discover_ranks(os.environ)
    device = choose_device(kind, ranks, threads)
    from megatron_switchlora.train.engine import start_distributed

    start_distributed(device)
    return ranks, device


def make_engine(
    config: RunConfig, vocab_size: Optional[int], device: torch.device, ds_config: Optional[dict[str, Any]] = None
) -> Engine:
    """Return a fresh engine, by default at ZeRO stage 1 and with the configuration's vocabulary size."""
    from megatron_switchlora.train.engine import Engine
    from megatron_switchlora.train.phases import choose_elementwise, run_mesh

    mesh = run_mesh(config)
    model = build_model(config.model, vocab_size, mesh.axis("tp"))
    initialize_weights(model, config.train.seed)
    model.use(choose_elementwise(config.train.compile, device))
    resolved = resolve_ds_config(ds_config or read_ds_config(None), config, mesh.size("dp"))
    return Engine(model, build_method(config, model, mesh), config, resolved, mesh, device)


def watch(target: Any, name: str, spent: dict[str, list[float]], key: str) -> None:
    """Add the seconds spent in a method to the last entry of spent[key]."""
    function: Callable[..., Any] = getattr(target, name)
    spent.setdefault(key, [])

    def call(*args: Any) -> Any:
        began = time.perf_counter()
        result = function(*args)
        spent[key][-1] += time.perf_counter() - began
        return result

    setattr(target, name, call)


def describe_machine() -> dict[str, Any]:
    """Return the machine, the threads of this process, and the versions."""
    return {**machine(), "threads": torch.get_num_threads(), **versions()}


def publish(result: dict[str, Any], out: Optional[Path]) -> None:
    """Print a result as JSON, and write it to a file if there is one."""
    text = json.dumps(result, indent=1)
    print(text)
    if out is not None:
        out.write_text(text + "\n", encoding="utf-8")
