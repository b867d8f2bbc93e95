"""The phases of a run: full-rank training first, if `method.full_rank_steps` asks for it, then the method.

A phase is a stretch of steps trained by one engine. The full-rank phase trains every weight at
`method.full_rank_lr` on the run's learning-rate schedule, all ranks being data-parallel whatever the LTE
heads. The method then begins from its weights, rounded to the run's precision, as from any initial ones: with
a warm-up, schedules and merges that count from its own first step, over the steps that are left. The order of
the data goes on through both. A checkpoint at the border holds the end of the full-rank phase.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from megatron_switchlora.config.ds_config import resolve_ds_config
from megatron_switchlora.config.run import RunConfig, full_rank_config, method_config
from megatron_switchlora.data.loader import BatchOrder, Reader, Samples, TrainLoader
from megatron_switchlora.distributed.mesh import Mesh, build_mesh
from megatron_switchlora.methods import build_method
from megatron_switchlora.methods.ga_gradients import find_factors
from megatron_switchlora.model.protocol import LanguageModel
from megatron_switchlora.train.engine import Engine


@dataclass
class Phase:
    """Steps from `first` on; `ds_config` is the resolved DeepSpeed JSON."""

    first: int
    config: RunConfig
    mesh: Mesh
    ds_config: dict[str, Any]
    loader: TrainLoader


def build_phases(
    config: RunConfig, given_ds_config: dict[str, Any], samples: Samples, order: BatchOrder
) -> list[Phase]:
    """All phases, in order. Collective over the world."""
    border = config.method.full_rank_steps
    phases = []
    for first, own in [(0, full_rank_config(config))] * (border > 0) + [(border, method_config(config))]:
        mesh, local = build_mesh(own.parallel), own.method.facts.heads_here
        reader = Reader(mesh.rank("dp"), mesh.size("dp"), mesh.heads(local).start, own.heads, local)
        loader = TrainLoader(samples, order, own.train.micro_batch_size, reader)
        phases.append(Phase(first, own, mesh, resolve_ds_config(given_ds_config, own, mesh.size("dp")), loader))
    return phases


def start_engine(
    phase: Phase, model: LanguageModel, samples: Samples, device: torch.device, begins: bool = True
) -> Engine:
    """The phase's engine around an initialised model; one that does not begin is to be filled from a checkpoint."""
    factors = find_factors(phase.config, model, phase.mesh, samples, device) if begins else None
    method = build_method(phase.config, model, phase.mesh, factors)
    return Engine(model, method, phase.config, phase.ds_config, phase.mesh, device)
