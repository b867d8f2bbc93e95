"""Measure what switching costs: its share of a step, the step against plain LoRA, and bytes of optimizer state.

Two engines in one process, LoRA and SwitchLoRA with the quick start's model and batch, step in turn on the same
random tokens; the schedule is so long that the switching rate stays at its start (the most it ever is). Inside
SwitchLoRA's step `before_step` and `after_step` (plan, folds, bank, row resets, masks) are timed. Medians; the
ratio is taken step by step. Optimizer state is the size of the tensors that the optimizer holds.

    switchlora bench switching --out benchmarks/switching_cpu.json
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from megatron_switchlora.config.command_line import parse_arguments
from megatron_switchlora.config.field_checks import number_from
from megatron_switchlora.disk import user_path
from megatron_switchlora.startup.door import the_door
from megatron_switchlora.startup.environment import end_rank
from megatron_switchlora.study.benchmarks.common import describe_machine, join_ranks, make_engine, publish, watch

if TYPE_CHECKING:
    from megatron_switchlora.train.engine import Engine


def state_bytes_per_lora_parameter(engine: Engine) -> float:
    """Return the bytes of optimizer state per adapter parameter (one process owns all of them)."""
    group = next(g for g in engine.optimizer.param_groups if g["name"] == "matrices")
    held = sum(
        tensor.numel() * tensor.element_size()
        for master in group["params"]
        for tensor in engine.optimizer.state[master].values()
    )
    return held / sum(param.numel() for param in engine.method.matrices())


def measure(steps: int, vocab_size: int) -> dict[str, Any]:
    base = ["--config", "cpu_quickstart", "--train.device", "cpu"]
    base += ["--method.switch.total_steps", "1000000"]
    _, device = join_ranks("cpu")
    configs = {name: parse_arguments([*base, "--method.name", name]).config for name in ("lora", "switchlora")}
    engines = {name: make_engine(config, vocab_size, device) for name, config in configs.items()}
    spent: dict[str, list[float]] = {}
    for name in ("before_step", "after_step"):
        watch(engines["switchlora"].method, name, spent, "switching")
    train = configs["switchlora"].train
    generator = torch.Generator().manual_seed(0)
    seconds: dict[str, list[float]] = {"lora": [], "switchlora": []}
    switched = 0
    for step in range(steps + 5):
        shape = (train.global_batch_size, train.seq_len + 1)
        batches = list(torch.randint(0, vocab_size, shape, generator=generator).split(train.micro_batch_size))
        spent["switching"].append(0.0)
        for name, engine in engines.items():
            began = time.perf_counter()
            result = engine.train_step(step, batches)
            seconds[name].append(time.perf_counter() - began)
            switched += result.switched
    shares = [s / whole for s, whole in zip(spent["switching"], seconds["switchlora"], strict=True)][5:]
    ratios = [a / b for a, b in zip(seconds["switchlora"], seconds["lora"], strict=True)][5:]
    return {
        "steps": steps,
        "interval0": configs["switchlora"].method.switch.interval0,
        "vectors_switched_per_step": switched / (steps + 5),
        "share_of_step_in_switching": median(shares),
        "step_time_switchlora_over_lora": median(ratios),
        "median_step_seconds": {name: median(values[5:]) for name, values in seconds.items()},
        "optimizer_state_bytes_per_lora_parameter": state_bytes_per_lora_parameter(engines["switchlora"]),
        "machine": describe_machine(),
    }


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=number_from(1), default=60)
    parser.add_argument("--vocab_size", type=number_from(1), default=1024)
    parser.add_argument("--out", type=user_path, default=None, help="also write the JSON here")
    arguments = parser.parse_args(argv)
    with the_door():
        publish(measure(arguments.steps, arguments.vocab_size), arguments.out)
        end_rank(0)
