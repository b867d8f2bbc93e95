#!/usr/bin/env python3
"""What switching costs: its share of a step, the step against plain LoRA, and bytes of optimizer state.

Two engines in one process, LoRA and SwitchLoRA with the quick start's model and batch, step in turn on the same
random tokens; the schedule is so long that the switching rate stays at its start (the most it ever is). Inside
SwitchLoRA's step `before_step` and `after_step` (plan, folds, bank, row resets, masks) are timed. Medians; the
ratio is taken step by step. Optimizer state is the size of the tensors that the optimizer holds.

    python tools/measure_switching.py --out benchmarks/switching_cpu.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Optional

import torch

from megatron_switchlora.config.command_line import parse_arguments
from megatron_switchlora.config.ds_config import read_ds_config, resolve_ds_config
from megatron_switchlora.config.field_checks import number_from
from megatron_switchlora.config.run import RunConfig
from megatron_switchlora.disk import user_path
from megatron_switchlora.distributed.mesh import build_mesh
from megatron_switchlora.methods import build_method
from megatron_switchlora.model.protocol import build_model, initialize_weights
from megatron_switchlora.run.folder import versions
from megatron_switchlora.startup.device import choose_device
from megatron_switchlora.startup.door import the_door
from megatron_switchlora.startup.environment import discover_ranks, end_rank

if TYPE_CHECKING:
    from megatron_switchlora.train.engine import Engine

ROOT = Path(__file__).resolve().parents[1]


def make_engine(
    config: RunConfig, vocab_size: Optional[int], device: torch.device, ds_config: Optional[dict[str, Any]] = None
) -> Engine:
    """A fresh engine, by default at ZeRO stage 1; without a vocabulary size, the configuration's."""
    from megatron_switchlora.train.engine import Engine

    mesh = build_mesh(config.parallel)
    model = build_model(config.model, vocab_size, mesh.axis("tp"))
    initialize_weights(model, config.train.seed)
    resolved = resolve_ds_config(ds_config or read_ds_config(None), config, mesh.size("dp"))
    return Engine(model, build_method(config, model, mesh), config, resolved, mesh, device)


def watch(engine: Engine, spent: list[float]) -> None:
    """Add the seconds of before_step and after_step to the last entry of `spent`."""

    def timed(function: Any) -> Any:
        def call(step: int) -> Any:
            began = time.perf_counter()
            result = function(step)
            spent[-1] += time.perf_counter() - began
            return result

        return call

    engine.method.before_step = timed(engine.method.before_step)  # type: ignore[method-assign]
    engine.method.after_step = timed(engine.method.after_step)  # type: ignore[method-assign]


def state_bytes_per_lora_parameter(engine: Engine) -> float:
    """Bytes of optimizer state of the adapters' group over their parameters (one process owns all of them)."""
    group = next(g for g in engine.optimizer.param_groups if g["name"] == "matrices")
    held = sum(
        tensor.numel() * tensor.element_size()
        for master in group["params"]
        for tensor in engine.optimizer.state[master].values()
    )
    return held / sum(param.numel() for param in engine.method.matrices())


def measure(steps: int, vocab_size: int) -> dict[str, Any]:
    base = ["--config", str(ROOT / "launch" / "configs" / "cpu_quickstart.yaml"), "--train.device", "cpu"]
    base += ["--method.switch.total_steps", "1000000"]
    device = choose_device("cpu", discover_ranks(os.environ), 0)
    from megatron_switchlora.train.engine import start_distributed

    start_distributed(device)
    configs = {name: parse_arguments([*base, "--method.name", name]).config for name in ("lora", "switchlora")}
    engines = {name: make_engine(config, vocab_size, device) for name, config in configs.items()}
    spent: list[float] = []
    watch(engines["switchlora"], spent)
    train = configs["switchlora"].train
    generator = torch.Generator().manual_seed(0)
    seconds: dict[str, list[float]] = {"lora": [], "switchlora": []}
    switched = 0
    for step in range(steps + 5):
        shape = (train.global_batch_size, train.seq_len + 1)
        batches = list(torch.randint(0, vocab_size, shape, generator=generator).split(train.micro_batch_size))
        spent.append(0.0)
        for name, engine in engines.items():
            began = time.perf_counter()
            result = engine.train_step(step, batches)
            seconds[name].append(time.perf_counter() - began)
            switched += result.switched
    shares = [s / whole for s, whole in zip(spent, seconds["switchlora"], strict=True)][5:]
    ratios = [a / b for a, b in zip(seconds["switchlora"], seconds["lora"], strict=True)][5:]
    return {
        "steps": steps,
        "interval0": configs["switchlora"].method.switch.interval0,
        "vectors_switched_per_step": switched / (steps + 5),
        "share_of_step_in_switching": median(shares),
        "step_time_switchlora_over_lora": median(ratios),
        "median_step_seconds": {name: median(values[5:]) for name, values in seconds.items()},
        "optimizer_state_bytes_per_lora_parameter": state_bytes_per_lora_parameter(engines["switchlora"]),
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads(), **versions()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=number_from(1), default=60)
    parser.add_argument("--vocab_size", type=number_from(1), default=1024)
    parser.add_argument("--out", type=user_path, default=None, help="also write the JSON here")
    arguments = parser.parse_args()
    with the_door():
        text = json.dumps(measure(arguments.steps, arguments.vocab_size), indent=1)
        print(text)
        if arguments.out is not None:
            arguments.out.write_text(text + "\n", encoding="utf-8")
        end_rank(0)


if __name__ == "__main__":
    main()
