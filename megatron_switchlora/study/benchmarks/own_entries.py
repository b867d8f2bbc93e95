"""The package's own methods as entries of a comparison: engines under DeepSpeed at ZeRO 1."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Optional

import torch

from megatron_switchlora.config.method import MethodConfig, make_method
from megatron_switchlora.config.run import RunConfig
from megatron_switchlora.study.benchmarks.common import make_engine
from megatron_switchlora.study.benchmarks.turns import Batches, Clock, Entry

if TYPE_CHECKING:
    from megatron_switchlora.train.engine import Engine

OWN: dict[str, Optional[dict[str, Any]]] = {  # options of the method; None: it has no rank
    "full": None,
    "lora": {"name": "lora"},
    "switchlora merged": {"name": "switchlora", "compute": "merged"},
    "switchlora split": {"name": "switchlora", "compute": "split"},
    "lte": {"name": "lte", "lte__local_heads": 2},
}


def own_method(name: str, rank: int) -> MethodConfig:
    """Return the method of an entry."""
    options = OWN[name]
    return make_method("full") if options is None else make_method(rank=rank, **options)


def own_entry(config: RunConfig, device: torch.device) -> Entry:
    """Return an engine with clocks around the parts of its step."""
    engine, clock = make_engine(config, None, device), Clock(device)
    clock.around(engine.ds, "forward", "forward")
    clock.around(engine.ds, "backward", "backward")
    clock.around(engine.ds, "step", "optimizer")
    for name in ("before_step", "after_step"):
        clock.around(engine.method, name, "switch")
    facts = {"trained_parameters": sum(param.numel() for param in engine.params)}

    def step(number: int, batches: Batches) -> float:
        return engine.train_step(number, batches).loss

    return Entry(step, clock, facts, lambda: sent(engine))


def sent(engine: Engine) -> dict[str, int]:
    """Return the bytes of the last step's collectives by phase; "other" are those of the forward pass."""
    phases = ("gradient", "switch", "step", "merge", "control", "other")
    return {phase: engine.recorder.total(phase) for phase in phases}
