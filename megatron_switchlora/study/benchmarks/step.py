"""Measure what a step costs: full-rank against SwitchLoRA merged and split, the cache policies, switching and the bank.

Engines of one model under DeepSpeed in one process step in turn on the same random tokens; each round's times are
divided by the full-rank step of that round, and medians over rounds are reported. "linears" are the seven projections
of a layer alone, forward and backward, in the same manner: attention, norms and optimizer cost the same in all methods
and draw the ratio of a whole step towards 1. FLOP ratios are by the formulas of the seven linears (and, for a step, the
head). "held" is what the forward pass keeps for the backward pass beside the parameters: saved tensors, W + sBA among
them. The switching rate is that of the start.

    switchlora bench step --out benchmarks/step_cpu.json
    torchrun --nproc_per_node 2 --no-python switchlora bench step --tp 2 --divisors 4 --out benchmarks/step_cpu_tp2.json

Under tensor parallelism the bytes a rank hands to collectives over tp are recorded too: those of the bank's fetch, and
all others of a step.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.graph import saved_tensors_hooks

from megatron_switchlora.config.field_checks import number_from
from megatron_switchlora.config.method import MethodConfig, make_method
from megatron_switchlora.config.model import ModelConfig
from megatron_switchlora.config.optim import OptimConfig
from megatron_switchlora.config.parallel import ParallelConfig
from megatron_switchlora.config.run import RunConfig, full_rank_config
from megatron_switchlora.config.train import TrainConfig
from megatron_switchlora.disk import user_path
from megatron_switchlora.distributed.linear import ColumnParallelLinear
from megatron_switchlora.distributed.precision import PRECISIONS
from megatron_switchlora.distributed.shard import Axis
from megatron_switchlora.lowrank.linear import LowRankLinear
from megatron_switchlora.lowrank.merged import choose_form
from megatron_switchlora.model.protocol import projections
from megatron_switchlora.planning.step_time import matrix_flops
from megatron_switchlora.startup.door import Door, the_door
from megatron_switchlora.startup.environment import end_rank
from megatron_switchlora.study.benchmarks.common import describe_machine, join_ranks, make_engine, watch
from megatron_switchlora.study.benchmarks.turns import batches, ratio, wait_for

if TYPE_CHECKING:
    from megatron_switchlora.train.engine import Engine

SEQ_LEN = 512


def make_config(options: argparse.Namespace, method: MethodConfig, precision: str, micro_batches: int) -> RunConfig:
    samples = options.tokens // SEQ_LEN
    return RunConfig(
        model=ModelConfig(
            vocab_size=options.vocab_size, hidden_size=options.hidden_size, num_layers=options.num_layers,
            intermediate_size=options.intermediate_size, num_heads=options.hidden_size // 64,
        ),
        method=method,
        optim=OptimConfig(lr=1e-4),
        train=TrainConfig(
            steps=10**6, warmup_steps=0, seq_len=SEQ_LEN, micro_batch_size=samples // micro_batches,
            global_batch_size=samples, precision=precision,  # type: ignore[arg-type]
        ),
        parallel=ParallelConfig(tp=options.tp),
    )  # fmt: skip


def flop_ratio(config: RunConfig, head: bool = True) -> float:
    """Return the FLOPs of a rank's linears in a step, with or without the head, over full-rank's."""
    model, tp = config.model, config.parallel.tp
    rest = 6 * model.hidden_size * (model.vocab_size or 0) * head / tp

    def flops(of: RunConfig) -> float:
        layer = sum(matrix_flops(of, projection, tp, 1, False, False) for projection in projections(model))
        return rest + model.num_layers * layer

    return flops(config) / flops(full_rank_config(config))


def held_bytes(engine: Engine, tokens: torch.Tensor) -> int:
    """Return the bytes of the storages that a forward pass keeps for backward, without parameters and buffers."""
    known = {t.untyped_storage().data_ptr() for t in [*engine.model.parameters(), *engine.model.buffers()]}
    seen: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = engine.model(tokens[:, :-1], tokens[:, 1:])
    del loss
    for linear in getattr(engine.method, "linears", {}).values():
        linear.forget_merged()
    return sum(seen.values())


def watch_switching(engine: Engine, spent: dict[str, list[float]]) -> None:
    watch(engine.method, "before_step", spent, "switching")
    watch(engine.method, "after_step", spent, "switching")
    watch(engine.method.bank, "fetch", spent, "bank")  # type: ignore[attr-defined]
    watch(engine.method.bank, "put_back", spent, "bank")  # type: ignore[attr-defined]


def compare(
    engines: dict[str, Engine], rounds: int, spent: dict[str, dict[str, list[float]]]
) -> dict[str, list[float]]:
    """Return the seconds of every engine's steps, interleaved; the first round warms up and is dropped."""
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for step in range(rounds + 1):
        for name, engine in engines.items():
            data = batches(engine.config)(step)
            for values in spent.get(name, {}).values():
                values.append(0.0)
            began = time.perf_counter()
            engine.train_step(step, data)
            seconds[name].append(time.perf_counter() - began)
    return {name: values[1:] for name, values in seconds.items()}


def forms(options: argparse.Namespace, precision: str, device: torch.device) -> dict[str, Any]:
    """Compare full-rank training with both forms at each rank."""
    engines: dict[str, Engine] = {}
    configs: dict[str, RunConfig] = {}
    spent: dict[str, dict[str, list[float]]] = {}
    full = make_config(options, make_method("full"), precision, 1)
    engines["full"] = make_engine(full, None, device)
    for divisor in options.divisors:
        for compute in ("merged", "split"):
            method = make_method(rank=options.hidden_size // divisor, compute=compute)
            name = f"{compute} r=h/{divisor}"
            configs[name] = make_config(options, method, precision, 1)
            engines[name] = make_engine(configs[name], None, device)
            spent[name] = {}
            watch_switching(engines[name], spent[name])
    seconds = compare(engines, options.rounds, spent)
    results: dict[str, Any] = {"full": {"seconds": median(seconds["full"])}}
    for name, config in configs.items():
        shares = {key: round(median(v / t for v, t in zip(values[1:], seconds[name], strict=True)), 5)
                  for key, values in spent[name].items()}  # fmt: skip
        results[name] = {
            "step_ratio": ratio(seconds[name], seconds["full"]),
            "flop_ratio": round(flop_ratio(config), 4),
            "share_of_step": shares,
        }
        if options.tp > 1:
            recorder = engines[name].recorder  # of the last step
            bank = recorder.total("switch", engines[name].mesh.group("tp"))
            results[name]["tp_bytes"] = {
                "bank": bank,
                "other": recorder.total(None, engines[name].mesh.group("tp")) - bank,
            }
        print(precision, name, results[name], flush=True)
    return results


def make_layers(config: RunConfig, dtype: torch.dtype, device: torch.device) -> list[torch.nn.Module]:
    """Return the seven projections of a layer, plain or adapted, with random weights."""
    layers: list[torch.nn.Module] = []
    for projection in projections(config.model):
        base = ColumnParallelLinear(projection.in_features, projection.out_features, Axis()).to(device)
        torch.nn.init.normal_(base.weight, std=0.02)
        method = config.method
        form = choose_form(config)
        layer = LowRankLinear(base, method.rank, method.scaling, form) if method.facts.adapts else base
        for param in layer.parameters():
            torch.nn.init.normal_(param, std=0.02)
            param.data = param.data.to(device, dtype)
        layers.append(layer)
    return layers


def linears(options: argparse.Namespace, precision: str, device: torch.device) -> dict[str, Any]:
    """Time the seven projections alone: plain, merged and split at each rank."""
    dtype = PRECISIONS[precision]
    configs = {"full": make_config(options, make_method("full"), precision, 1)}
    for divisor in options.divisors:
        for compute in ("merged", "split"):
            method = make_method(rank=options.hidden_size // divisor, compute=compute)
            configs[f"{compute} r=h/{divisor}"] = make_config(options, method, precision, 1)
    layers = {name: make_layers(config, dtype, device) for name, config in configs.items()}
    widths = [projection.in_features for projection in projections(configs["full"].model)]
    inputs = {n: torch.randn(options.tokens, n, device=device, dtype=dtype, requires_grad=True) for n in widths}
    seconds: dict[str, list[float]] = {name: [] for name in layers}
    for _ in range(options.rounds + 1):
        for name, modules in layers.items():
            began = time.perf_counter()
            for width, layer in zip(widths, modules, strict=True):
                y = layer(inputs[width])
                y.backward(y.detach())
            wait_for(device)
            seconds[name].append(time.perf_counter() - began)
    results = {
        name: {
            "ratio": ratio(seconds[name][1:], seconds["full"][1:]),
            "flop_ratio": round(flop_ratio(config, False), 4),
        }
        for name, config in configs.items()
        if name != "full"
    }
    print(precision, "linears", results, flush=True)
    return results


def policies(options: argparse.Namespace, precision: str, device: torch.device) -> dict[str, Any]:
    """Compare the cache policies over four micro-batches with the split form."""
    engines = {}
    for name in ("split", "micro_batch", "accumulation", "recompute"):
        method = make_method(rank=options.hidden_size // 4, compute="split" if name == "split" else "merged")
        if name != "split":
            method.merged_cache = name  # type: ignore[assignment]
        engines[name] = make_engine(make_config(options, method, precision, 4), None, device)
    held = {name: held_bytes(engine, batches(engine.config)(0)[0]) for name, engine in engines.items()}
    seconds = compare(engines, options.rounds, {})
    results = {
        name: {"step_ratio_to_split": ratio(seconds[name], seconds["split"]), "held_bytes": held[name]}
        for name in engines
    }
    print(precision, results, flush=True)
    return results


def run(options: argparse.Namespace, door: Door) -> None:
    """Measure on the launcher's ranks; rank 0 writes the result."""
    ranks, device = join_ranks(options.device)
    door.watch_others(ranks, 300)
    result: dict[str, Any] = {
        "setting": {key: value for key, value in vars(options).items() if key != "out"},
        "machine": describe_machine() | {"device": str(device)},
    }  # fmt: skip
    for precision in options.precisions:
        result[precision] = {"forms": forms(options, precision, device)}
        if options.tp == 1:
            result[precision] |= {
                "linears": linears(options, precision, device),
                "policies": policies(options, precision, device),
            }
    if ranks.rank == 0:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=user_path, required=True)
    parser.add_argument("--hidden_size", type=number_from(1), default=1024)
    parser.add_argument("--intermediate_size", type=number_from(1), default=2736)
    parser.add_argument("--num_layers", type=number_from(1), default=1)
    parser.add_argument("--vocab_size", type=number_from(1), default=1024)
    parser.add_argument("--tokens", type=number_from(1), default=4096, help="tokens per step")
    parser.add_argument("--rounds", type=number_from(1), default=5)
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--tp", type=number_from(1), default=1)
    parser.add_argument(
        "--divisors", type=number_from(1), nargs="+", default=[4, 8, 16], help="of the hidden size, giving ranks"
    )
    parser.add_argument("--device", default="auto")
    options = parser.parse_args(argv)
    with the_door() as door:
        run(options, door)
        end_rank(0)
