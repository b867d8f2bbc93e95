"""Bytes of the tensors that live between steps and inside one, and of a step's gradients, in every optimizer class."""

from __future__ import annotations

import gc
from typing import Any

import torch

from megatron_switchlora.config.ds_config import resolve_ds_config, zero_settings
from megatron_switchlora.config.model import ModelConfig
from megatron_switchlora.planning.memory import memory_items, phase_bytes
from megatron_switchlora.planning.traffic import gradient_bytes
from tests.dist.engines import DS_JSON, build_engine, micro_batches, start
from tests.plain import VOCAB, make_batches, small_config


def live_bytes() -> int:
    """Storage of all tensors that Python can reach, and of their gradients."""
    gc.collect()
    found = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    found += [tensor.grad for tensor in found if tensor.is_leaf and tensor.grad is not None]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in found}
    return sum(storages.values())


def measure(precision: str, stage: str, base: str, mesh: Any) -> dict[str, float]:
    """Measured over predicted bytes."""
    config = small_config("switchlora", train__precision=precision, method__base_spread=base)
    config.method.switch.interval0 = 1e9  # none on its way
    config.model = ModelConfig(hidden_size=96, intermediate_size=157, num_layers=4, num_heads=4)
    batch = make_batches(config, 1)[0]
    before = live_bytes()
    engine = build_engine(config, stage, mesh)
    seen: list[int] = []
    step = engine.optimizer.step

    def look_and_step() -> None:
        seen.append(live_bytes() - before)
        step()

    assert engine.train_step(0, micro_batches(config, batch, mesh)).healthy
    engine.optimizer.step = look_and_step
    result = engine.train_step(1, micro_batches(config, batch, mesh))
    between = live_bytes() - before

    resolved = resolve_ds_config(DS_JSON[stage], config, mesh.size("dp"))
    zero = zero_settings(resolved)
    items = memory_items(config, VOCAB, mesh.size("tp"), mesh.size("dp"), zero)
    throughout = phase_bytes(items, "always")
    # DeepSpeed drops gradients when the step is over, and a step's copies to reduce before the optimizer begins
    gradients = sum(item.bytes for item in items if item.phase == "always" and item.kind.startswith("gradients,"))
    copies = sum(item.bytes for item in items if item.kind == "copies to reduce")
    given, _ = gradient_bytes(config, VOCAB, mesh.size("tp"), mesh.size("dp"), zero)
    return {
        "between steps": between / (throughout - gradients),
        "in a step": max(seen) / (throughout + phase_bytes(items, "step") - copies),
        "gradients": result.dp_bytes / given,
    }


def act(payload: dict[str, Any]) -> dict[str, Any]:
    mesh = start(payload["tp"])
    return {
        f"{precision} {stage} {base}": measure(precision, stage, base, mesh)
        for precision, stage, base in payload["classes"]
    }
