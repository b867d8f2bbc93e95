"""The most memory a training step holds at once, as the allocator sees it, and as it was predicted."""

from __future__ import annotations

from typing import Any

from megatron_switchlora.config.ds_config import resolve_ds_config, zero_settings
from megatron_switchlora.config.model import ModelConfig
from megatron_switchlora.planning.memory import memory_items, peak_bytes, phase_bytes
from tests.dist.engines import DS_JSON, build_engine, micro_batches, start
from tests.dist.memory_worker import live_bytes
from tests.plain import VOCAB, make_batches, peak_of, small_config

MODEL = ModelConfig(hidden_size=128, intermediate_size=344, num_layers=4, num_heads=4)


def measure(case: dict[str, Any], mesh: Any) -> tuple[int, int]:
    """(measured, predicted) bytes of the peak."""
    changes = {"train__seq_len": 64, "train__micro_batch_size": 4, "train__global_batch_size": 8 * mesh.size("dp"),
               "train__compile": "off"}  # fmt: skip
    config = small_config(case["method"], **changes, **case["changes"])
    config.model, config.method.rank = MODEL, 32
    if config.method.facts.switches:
        config.method.switch.interval0 = 1e9
    before = live_bytes()
    engine = build_engine(config, case["stage"], mesh)
    batches = make_batches(config, 2)
    engine.train_step(0, micro_batches(config, batches[0], mesh))
    pieces = micro_batches(config, batches[1], mesh)
    held = live_bytes() - before
    highest = peak_of(lambda: engine.train_step(1, pieces))
    engine.ds.destroy()  # or its hooks keep it alive into the next case
    zero = zero_settings(resolve_ds_config(DS_JSON[case["stage"]], config, mesh.size("dp")))
    items = memory_items(config, VOCAB, mesh.size("tp"), mesh.size("dp"), zero)
    return held + highest, peak_bytes(items) + phase_bytes(items, "host")  # here all of it is host memory


def act(payload: dict[str, Any]) -> list[tuple[int, int]]:
    mesh = start(payload["tp"])
    return [measure(case, mesh) for case in payload["cases"]]
