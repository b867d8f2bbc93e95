"""Build engines inside a worker: many in one process, one launch per mesh."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_switchlora.config.ds_config import resolve_ds_config
from megatron_switchlora.config.parallel import ParallelConfig
from megatron_switchlora.config.run import RunConfig
from megatron_switchlora.distributed.mesh import Mesh, build_mesh
from megatron_switchlora.methods import build_method
from megatron_switchlora.methods.ga_gradients import find_factors
from megatron_switchlora.model.llama.model import LlamaForCausalLM
from megatron_switchlora.model.protocol import initialize_weights
from tests.plain import VOCAB, by_heads, make_samples

DS_JSON: dict[str, dict[str, Any]] = {
    "0": {"zero_optimization": {"stage": 0}},
    "1": {"zero_optimization": {"stage": 1}},
    "2": {"zero_optimization": {"stage": 2}},
    "1f": {"zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}},
    "1s": {"zero_optimization": {"stage": 1, "reduce_bucket_size": 500_000}},
    "2s": {"zero_optimization": {"stage": 2, "reduce_bucket_size": 500_000}},
}


def start(tp: int = 1, heads: int = 1) -> Mesh:
    """Bring up communication on the CPU and build the mesh."""
    device = torch.device("cpu")
    from megatron_switchlora.train.engine import start_distributed

    start_distributed(device, timeout_s=60)
    return build_mesh(ParallelConfig(tp=tp, lte_heads=heads))


def build_engine(config: RunConfig, stage: str, mesh: Mesh, begins: bool = True) -> Any:
    """A fresh engine; `stage` is a key of DS_JSON. One that does not begin a run is to be filled from a checkpoint."""
    from megatron_switchlora.train.engine import Engine

    model = LlamaForCausalLM(config.model, VOCAB, mesh.axis("tp"))
    initialize_weights(model, config.train.seed)
    device = torch.device("cpu")
    factors = find_factors(config, model, mesh, make_samples(config), device) if begins else None
    method = build_method(config, model, mesh, factors)
    ds_config = resolve_ds_config(DS_JSON[stage], config, mesh.size("dp"))
    return Engine(model, method, config, ds_config, mesh, device)


def micro_batches(config: RunConfig, batch: Tensor, mesh: Mesh) -> list[Tensor]:
    """This rank's part of a global batch, in micro-batches."""
    return by_heads(config, batch, mesh)


def full_rows(engine: Any, param: torch.nn.Parameter) -> dict[str, Tensor]:
    """Master, moments and row steps of a parameter, put together over the data ranks."""
    mine = engine.optimizer.read_rows(param)
    if type(engine.ds.optimizer).__name__ in ("RowAdamW", "GaloreAdamW", "FP16_UnfusedOptimizer"):
        return mine  # every rank has all of it
    group, (counters, values) = engine.mesh.group("dp"), (mine.pop("row_step"), torch.stack(list(mine.values())))
    dist.all_reduce(values, group=group)
    # A row cut by a partition boundary has its counter on both ranks, equal: take the larger.
    dist.all_reduce(counters, op=dist.ReduceOp.MAX, group=group)
    return {**dict(zip(mine, values, strict=True)), "row_step": counters}
