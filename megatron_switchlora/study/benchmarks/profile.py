"""Show where the time of a step goes: a traced step of each entry, its operators sorted by what they are for.

    products with W          of activations with dense weights or W + sBA, and of W's gradient
    low-rank products        those with A or B
    forming W + sBA          products of B and A alone
    attention                softmax(q k) v, forward and backward
    output layer and loss    products with the output layer, softmax and cross entropy
    elementwise and copies   norms, rotary embedding, activation, sums, copies, embedding
    optimizer, switch        all that runs inside these parts of the step
    outside operators        on a CPU Python and the libraries' own time; on a GPU the time it idles

Each operator counts with its own time, on a GPU with its kernels' time, without that of operators it calls. Products
are distinguished by their sizes, so give sizes of which none is another's. Kernels of torch.compile are elementwise.
Medians of a few steps, each traced; tracing lengthens a step by little where products are large.

    switchlora bench profile --threads 1 --out benchmarks/profile_cpu.json
"""

from __future__ import annotations

import argparse
import gc
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any, Optional

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from megatron_switchlora.config.run import RunConfig
from megatron_switchlora.model.protocol import logits_size
from megatron_switchlora.startup.door import Door, the_door
from megatron_switchlora.startup.environment import end_rank
from megatron_switchlora.study.benchmarks.common import publish
from megatron_switchlora.study.benchmarks.entries import (
    build,
    entry_options,
    make_config,
    measured,
    wanted,
)
from megatron_switchlora.study.benchmarks.own_entries import OWN, own_method
from megatron_switchlora.study.benchmarks.peer_entries import Missing
from megatron_switchlora.study.benchmarks.turns import Batches, Entry, Step, batches, timed_step

KINDS = (
    "products with W", "low-rank products", "forming W + sBA", "attention", "output layer and loss",
    "elementwise and copies", "optimizer", "switch", "outside operators",
)  # fmt: skip
PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "addmm_", "baddbmm_", "mm_", "_grouped_mm")


@dataclass(frozen=True)
class Sizes:
    """Sizes by which products are distinguished."""

    vocabulary: frozenset[int]
    tokens: frozenset[int]
    ranks: frozenset[int]

    @staticmethod
    def of(config: RunConfig, rank: Optional[int], heads: int) -> Sizes:
        """Return those of an entry of some LTE heads; grouped projections have two or three times the rank."""
        model, train = config.model, config.train
        size, tokens = model.vocab_size or 0, train.micro_batch_size * train.seq_len
        return Sizes(
            frozenset({size, logits_size(model, size, config.parallel.tp)}),
            frozenset({tokens, tokens // heads}),
            frozenset(rank * times for times in (1, 2, 3)) if rank else frozenset(),
        )


def ancestors(event: FunctionEvent) -> Iterator[FunctionEvent]:
    """Yield an event and those that enclose it, the innermost first."""
    at: Optional[FunctionEvent] = event
    while at is not None:
        yield at
        at = at.cpu_parent


def shapes_of(event: FunctionEvent) -> list[list[int]]:
    """Return the shapes of an operator's tensors; scalars have none."""
    shapes: Any = event.input_shapes or []
    return [shape for shape in shapes if isinstance(shape, list) and shape]


def kind_of(event: FunctionEvent, sizes: Sizes) -> str:
    """Return what an operator is for."""
    names = [each.name for each in ancestors(event)]
    for part in ("optimizer", "switch"):
        if f"part: {part}" in names:
            return part
    if any("attention" in name.lower() or "ScaledDotProduct" in name for name in names):
        return "attention"
    shapes = shapes_of(event)
    of_vocabulary = any(sizes.vocabulary & set(shape) for shape in shapes)
    of_embedding = any("embedding" in name.lower() for name in names)
    of_loss = any("nll_loss" in name or "CrossEntropy" in name for name in names)
    if of_loss or (of_vocabulary and not of_embedding):
        return "output layer and loss"
    if event.name.removeprefix("aten::") in PRODUCTS:
        return product_kind([shape for shape in shapes if len(shape) >= 2][-2:], sizes)
    return "elementwise and copies"


def product_kind(shapes: list[list[int]], sizes: Sizes) -> str:
    """Return what a product of matrices [.., m, k] and [.., k, n] is for."""
    dims = {size for shape in shapes for size in shape[-2:]}
    if not sizes.ranks & dims:
        return "products with W"
    summed, outer = shapes[0][-1], {shapes[0][-2], shapes[-1][-1]}
    return "forming W + sBA" if summed in sizes.ranks and not outer & sizes.tokens else "low-rank products"


def traced(act: Callable[[], Step], device: torch.device, sizes: Sizes) -> dict[str, float]:
    """Return the seconds of a step by kind; `act` is a timed step."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, record_shapes=True) as profiler:
        seconds = act().seconds
    spent: defaultdict[str, float] = defaultdict(float)
    for event in profiler.events() or []:
        own = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if event.device_type == torch.autograd.DeviceType.CPU and not event.name.startswith("part: "):
            spent[kind_of(event, sizes)] += own / 1e6
    if on_gpu:  # kernels that no operator launched: those of torch.compile
        busy = sum(event.self_device_time_total for event in profiler.events() or [] if is_kernel(event)) / 1e6
        spent["elementwise and copies"] += max(0.0, busy - sum(spent.values()))
    spent["outside operators"] = max(0.0, seconds - sum(spent.values()))
    return {kind: spent[kind] for kind in KINDS}


def is_kernel(event: FunctionEvent) -> bool:
    """Return whether an event is work of the GPU: a kernel or a copy, not our own span."""
    return event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation


def trace_entry(entry: Entry, rounds: int, data: Callable[[int], Batches], sizes: Sizes) -> dict[str, Any]:
    """Return the median seconds by kind of a few steps, after one that warms up."""
    timed_step(entry, 0, data(0))
    plain = [timed_step(entry, number, data(number)).seconds for number in range(1, rounds + 1)]
    steps = []
    for number in range(rounds + 1, 2 * rounds + 1):
        steps.append(traced(partial(timed_step, entry, number, data(number)), entry.clock.device, sizes))
    by_kind = {kind: median(step[kind] for step in steps) for kind in KINDS}
    return {"seconds": median(plain), "traced_seconds": median(sum(step.values()) for step in steps), "kinds": by_kind}


def measure(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Return for each entry the seconds of a step by kind."""
    hidden, found = options.hidden_sizes[0], {}
    config = make_config(options, hidden, options.seq_lens[0], options.precisions[0], 1)
    data = batches(config)
    for title, name, rank in wanted(options, hidden):
        try:
            entry = build(options, config, name, rank, device)
        except Missing as reason:
            print(f"{title} is left out: {reason}", flush=True)
            continue
        heads = own_method(name, rank or 0).facts.heads_here if name in OWN else 1
        found[title] = trace_entry(entry, options.rounds, data, Sizes.of(config, rank, heads))
        del entry
        gc.collect()
    return found


def run(options: argparse.Namespace, door: Door) -> None:
    """Measure in this process; the first of the sizes and precisions counts."""
    _, found = measured(options, door, lambda options, _, device: {"entries": measure(options, device)})
    publish(found, options.out)


def main(argv: Sequence[str]) -> None:
    parser = entry_options(__doc__)
    parser.set_defaults(entries=["full", "lora", "switchlora merged", "switchlora split", "transformers", "peft lora"])
    options = parser.parse_args(argv)
    with the_door() as door:
        run(options, door)
        end_rank(0)
