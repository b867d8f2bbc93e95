"""Build the phases of a run: full-rank training for `method.full_rank_steps` steps, then the method.

A phase is a range of steps that one engine trains. The full-rank phase trains every weight on the run's learning-rate
schedule: the decoder's matrices at `method.full_rank_lr`, dense tensors at `optim.dense_lr`. All ranks are
data-parallel in it, also with LTE heads. The method then starts from its weights, rounded to the run's precision, as
from any initial weights. Warm-up, schedules and merges count from the method's own first step, over the remaining
steps. The order of the data continues through both phases. A checkpoint at the border holds the end of the full-rank
phase.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Optional

import torch
import torch.distributed as dist

from megatron_switchlora.config.ds_config import resolve_ds_config
from megatron_switchlora.config.errors import UserError
from megatron_switchlora.config.run import RunConfig, full_rank_config, method_config
from megatron_switchlora.data.loader import ReadAhead, Reader, Samples, TrainLoader
from megatron_switchlora.distributed.consensus import gather_texts
from megatron_switchlora.distributed.mesh import GroupTable, Mesh, build_mesh
from megatron_switchlora.methods import build_method
from megatron_switchlora.methods.ga_gradients import find_factors
from megatron_switchlora.model.elementwise import Elementwise, failure
from megatron_switchlora.model.fused_norm import apex_norm
from megatron_switchlora.model.protocol import LanguageModel
from megatron_switchlora.startup.launchers import own_host
from megatron_switchlora.train.context import RunContext
from megatron_switchlora.train.engine import Engine


@dataclass
class Phase:
    """The steps from `first` on; `ds_config` is the resolved DeepSpeed JSON."""

    first: int
    config: RunConfig
    mesh: Mesh
    ds_config: dict[str, Any]
    loader: ReadAhead


def build_phases(context: RunContext, given_ds_config: dict[str, Any]) -> list[Phase]:
    """Build all phases, in order. Collective over the world."""
    config, border = context.config, context.config.method.full_rank_steps
    phases, table = [], GroupTable(timedelta(seconds=config.parallel.timeout))
    full_rank = [(0, border, full_rank_config(config))] if border > 0 else []
    for first, end, settings in [*full_rank, (border, context.last_step, method_config(config))]:
        mesh, local = run_mesh(settings, table), settings.method.facts.heads_here
        reader = Reader(mesh.rank("dp"), mesh.size("dp"), mesh.heads(local).start, settings.heads, local)
        loader = TrainLoader(context.train_samples, context.order, settings.train.micro_batch_size, reader)
        ds_config = resolve_ds_config(given_ds_config, settings, mesh.size("dp"))
        phases.append(Phase(first, settings, mesh, ds_config, ReadAhead(loader, context.device, end)))
    return phases


def run_mesh(config: RunConfig, table: Optional[GroupTable] = None) -> Mesh:
    """Return the mesh of a run, divided by host if its options ask for that. Collective over the world."""
    hosts = gather_texts(own_host(os.environ)) if config.method.base_spread == "node" else None
    return build_mesh(config.parallel, table, hosts)


def build_engine(
    phase: Phase, model: LanguageModel, samples: Samples, device: torch.device, begins: bool = True
) -> Engine:
    """Return the phase's engine around an initialised model.

    With `begins` the phase starts from this model; otherwise a checkpoint fills the engine later.
    """
    model.use(choose_elementwise(phase.config.train.compile, device))
    factors = find_factors(phase.config, model, phase.mesh, samples, device) if begins else None
    method = build_method(phase.config, model, phase.mesh, factors)
    return Engine(model, method, phase.config, phase.ds_config, phase.mesh, device)


def choose_elementwise(choice: str, device: torch.device) -> Elementwise:
    """Return how a model runs its elementwise parts; `choice` is `train.compile`.

    Raises:
        UserError: they are to be compiled, and cannot be.
    """
    if choice == "off" or (choice == "auto" and device.type != "cuda"):
        return Elementwise()
    problem = failure(device)
    if problem is None:
        return Elementwise(compiled=True)
    if choice == "on":
        raise UserError(f"train.compile on: torch.compile fails here ({problem}). Set train.compile off.")
    norm = apex_norm(device)
    if dist.get_rank() == 0:
        instead = "." if norm is None else "; norms run in the kernels of NVIDIA's apex."
        print(
            f"warning: train.compile auto compiles nothing, since torch.compile fails here ({problem}){instead}",
            flush=True,
        )
    return Elementwise(fused_norm=norm)
