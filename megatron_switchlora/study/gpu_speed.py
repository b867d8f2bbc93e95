"""Measure how fast the package is on a GPU: what `switchlora check-gpu` runs after its checks.

    products   the 1.3B model's products, padded and not: W's, the factors' at each rank, grouped projections
    parts      norm, rotary embedding, activation and loss, plain, as they run, and compiled
    speed      full-rank and SwitchLoRA steps of the model: time, parts, operators by kind, memory against the plan
    peers      a step against other libraries' on a smaller model, in turn
All shrink with `tiny`, to try them on a CPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from megatron_switchlora.config.ds_config import read_ds_config, resolve_ds_config, zero_settings
from megatron_switchlora.config.method import make_method
from megatron_switchlora.config.model import ModelConfig
from megatron_switchlora.config.optim import OptimConfig
from megatron_switchlora.config.run import RunConfig
from megatron_switchlora.config.train import TrainConfig
from megatron_switchlora.planning.memory import memory_items, peak_bytes
from megatron_switchlora.startup.device import peak_memory_bytes
from megatron_switchlora.startup.environment import Ranks
from megatron_switchlora.study.benchmarks.entries import entry_options
from megatron_switchlora.study.benchmarks.own_entries import own_entry
from megatron_switchlora.study.benchmarks.parts import compare, parts
from megatron_switchlora.study.benchmarks.peers import measure
from megatron_switchlora.study.benchmarks.profile import Sizes, traced
from megatron_switchlora.study.benchmarks.turns import batches, free, in_turn, timed_step

HOWS = {  # of the speed stage: name -> method
    "full": {"name": "full"},
    "switchlora": {"name": "switchlora", "merged_cache": "micro_batch"},
    "switchlora accumulation": {"name": "switchlora", "merged_cache": "accumulation"},
}
PEERS = ("full", "lora", "switchlora merged", "transformers", "peft lora", "muon")
COMPILED = ("switchlora merged", "transformers", "transformers compiled")


@dataclass(frozen=True)
class Shape:
    """The sizes of what is measured; those of the 1.3B model, unless they are tiny."""

    hidden: int = 2048
    widths: tuple[int, ...] = (5461, 5464, 5504)
    vocabularies: tuple[int, ...] = (32100, 32128)
    layers: int = 24
    ranks: tuple[int, ...] = (512, 256, 128)
    samples: int = 12
    seq_len: int = 512

    @property
    def tokens(self) -> int:
        return self.samples * self.seq_len


TINY = Shape(64, (170, 172, 192), (500, 512), 2, (16, 8, 4), 3, 24)


def shape_of(tiny: bool) -> Shape:
    """Return the sizes to measure."""
    return TINY if tiny else Shape()


def product_shapes(shape: Shape) -> Iterator[tuple[str, int, int, int]]:
    """Yield (name, m, k, n) of the products [m, k] [k, n] of a layer and the head."""
    tokens, hidden = shape.tokens, shape.hidden
    for label, sizes in (("F", shape.widths), ("V", shape.vocabularies)):
        for size in sizes:
            yield f"y = x W^T, {label} {size}", tokens, hidden, size
            yield f"dx = dy W, {label} {size}", tokens, size, hidden
            yield f"dW = dy^T x, {label} {size}", size, tokens, hidden
    for name, size in (("q", hidden), ("q, k, v", 3 * hidden)):
        yield f"y = x W^T, {name}", tokens, hidden, size
    for rank in shape.ranks:
        yield f"W + sBA, r {rank}", hidden, rank, hidden
        yield f"x A^T, r {rank}", tokens, hidden, rank
        yield f"dA, r {rank}", rank, tokens, hidden
        yield f"dA of q, k, v, r {rank}", 3 * rank, tokens, hidden


def products(device: torch.device, tiny: bool, seconds: Callable[[Callable[[], object], int], float]) -> dict[str, Any]:
    """Return TFLOP/s and milliseconds of each product in bf16."""
    found = {}
    for name, m, k, n in product_shapes(shape_of(tiny)):
        left = torch.randn(m, k, device=device, dtype=torch.bfloat16)
        right = torch.randn(n, k, device=device, dtype=torch.bfloat16).t()
        spent = seconds(lambda left=left, right=right: left @ right, 10)  # type: ignore[misc]
        found[name] = {"TFLOP/s": 2 * m * k * n / spent / 1e12, "milliseconds": spent * 1e3}
    return found


def layer_parts(device: torch.device, tiny: bool) -> dict[str, Any]:
    """Return times and held bytes of each part of a layer in bf16, by how it is computed."""
    shape = shape_of(tiny)
    sizes = argparse.Namespace(
        tokens=512 if tiny else shape.tokens, hidden_size=shape.hidden, intermediate_size=shape.widths[-1],
        vocab_size=shape.vocabularies[-1],
    )  # fmt: skip
    every = parts(sizes, torch.bfloat16, device)
    return {name: compare(forms, inputs, 1 if tiny else 7) for name, (forms, inputs) in every.items()}


def speed(device: torch.device, tiny: bool) -> dict[str, Any]:
    """Return what is measured of each way to train, at ZeRO 1."""
    shape = shape_of(tiny)
    model = ModelConfig(
        vocab_size=shape.vocabularies[0], hidden_size=shape.hidden, intermediate_size=shape.widths[0],
        num_layers=shape.layers, num_heads=shape.hidden // 64,
    )  # fmt: skip
    train = TrainConfig(
        steps=10**6, warmup_steps=0, seq_len=shape.seq_len, micro_batch_size=shape.samples,
        global_batch_size=2 * shape.samples, precision="bf16",
    )  # fmt: skip
    found = {}
    for name, options in HOWS.items():
        rank = shape.ranks[0]
        method = make_method(**options) if options["name"] == "full" else make_method(rank=rank, **options)
        found[name] = steps(RunConfig(model, method, OptimConfig(lr=1e-4), train), rank, device, 1 if tiny else 4)
        free(device)
    return found


def steps(config: RunConfig, rank: int, device: torch.device, rounds: int) -> dict[str, Any]:
    """Return time, parts, operators by kind, and memory of a step."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    vocab_size, train = config.model.vocab_size or 0, config.train
    entry, data = own_entry(config, device), batches(config)
    times = in_turn({"": entry}, rounds, data, lambda line: None)[""]
    peak, spent = peak_memory_bytes(device), median(times.seconds)
    entry.clock.waits = False
    kinds = traced(lambda: timed_step(entry, 10**4, data(10**4)), device, Sizes.of(config, rank, 1))
    zero = zero_settings(resolve_ds_config(read_ds_config(None), config, 1))
    planned = peak_bytes(memory_items(config, vocab_size, 1, 1, zero))
    return {
        "seconds per step": spent,
        "tokens per second": train.global_batch_size * train.seq_len / spent,
        "share of a step": times.shares(),
        "seconds by kind": kinds,
        "peak bytes": peak,
        "planned bytes": planned,
        "peak over plan": peak / planned if device.type == "cuda" else None,  # a CPU's peak is the whole process
        "losses": times.losses,
    }


def peers(device: torch.device, tiny: bool, names: tuple[str, ...]) -> dict[str, Any]:
    """Return the ratios of `switchlora bench peers` on a model of 0.1B parameters in bf16."""
    options = entry_options(None).parse_args(["--entries", *names, "--precisions", "bf16"])
    sizes: dict[str, Any] = {"hidden_sizes": [1024], "num_layers": 8, "tokens": 8192, "rounds": 5, "vocab_size": 32000}
    if tiny:
        sizes = {"hidden_sizes": [64], "num_layers": 1, "tokens": 64, "rounds": 1, "vocab_size": 61, "seq_lens": [16]}
        sizes["compile_backend"] = "eager"
    vars(options).update(sizes, divisors=[4], one_at_a_time=False)
    (case,) = measure(options, Ranks(), device)
    return case | {"right": all(entry["losses_agree"] for entry in case["entries"].values())}
