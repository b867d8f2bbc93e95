"""Count the bytes that a micro-batch's elementwise kernels read and write, on tensors without storage.

An operator that is neither a product nor attention reads its inputs and writes its results once. A function that a GPU
compiles (`model/elementwise.py`) is one kernel, which reads its inputs and writes its results. Views move nothing. The
count is of forward and backward pass on one rank, optimizer and switch apart; it grows by the same with every layer,
so one and two layers are counted. Nothing is computed or timed, and caches of a device are not counted.

    switchlora bench moved
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_switchlora.config.command_line import parse_arguments
from megatron_switchlora.config.field_checks import number_from
from megatron_switchlora.config.run import RunConfig
from megatron_switchlora.disk import user_path
from megatron_switchlora.distributed.precision import PRECISIONS
from megatron_switchlora.methods import build_method
from megatron_switchlora.model.elementwise import Elementwise
from megatron_switchlora.model.protocol import build_model
from megatron_switchlora.study.benchmarks.common import publish
from megatron_switchlora.study.benchmarks.profile import PRODUCTS

SHOWN = 12  # operators
UNREAD = ("copy_", "fill_", "zero_")  # operators that do not read what they write
FREE = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "_unsafe_view")


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested sequences."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from tensors_in(each)


def size_of(tensor: Tensor) -> int:
    """Return the bytes of a tensor's elements; what is expanded counts once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


class MovedBytes(TorchDispatchMode):
    """Sum up what operators move; `paused` while a compiled function runs."""

    def __init__(self) -> None:
        super().__init__()
        self.by_operator: Counter[str] = Counter()
        self.paused = False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        moves = function.namespace == "aten" and not function.is_view and name not in FREE
        if moves and not self.paused and name not in PRODUCTS and "attention" not in name:
            inputs = list(tensors_in(args))
            self.add(name, inputs[1:] if name in UNREAD else inputs, result)
        return result

    def add(self, name: str, inputs: Any, results: Any) -> None:
        """Count a kernel that reads and writes these."""
        self.by_operator[name] += sum(map(size_of, tensors_in(inputs))) + sum(map(size_of, tensors_in(results)))


class Fused(Elementwise):
    """Count each function as the one kernel that a GPU's compiler makes of it."""

    def __init__(self, counter: MovedBytes) -> None:
        super().__init__(compiled=True)
        self.counter = counter

    def run(self, function: Callable[..., Any], *inputs: Any) -> Any:
        self.counter.paused = True
        try:
            result = function(*inputs)
        finally:
            self.counter.paused = False
        self.counter.add(function.__name__, inputs, result)
        return result


def moved_bytes(config: RunConfig, vocab_size: int, layers: int, fused: bool) -> Counter[str]:
    """Return the bytes that a micro-batch moves through `layers` layers, by operator or compiled function."""
    train, counter = config.train, MovedBytes()
    with FakeTensorMode():
        model = build_model(replace(config.model, num_layers=layers), vocab_size)
        method = build_method(config, model)
        if fused:
            model.use(Fused(counter))
        for param in model.parameters():
            param.data = param.data.to(PRECISIONS[train.precision])
        method.allocate()
        tokens = torch.zeros(train.micro_batch_size, train.seq_len + 1, dtype=torch.int64)
        with counter:
            model(tokens[:, :-1], tokens[:, 1:]).sum().backward()
    return counter.by_operator


def measure(config: RunConfig, vocab_size: int) -> dict[str, Any]:
    """Return the bytes of the whole model, as it is computed eagerly and with its functions compiled."""
    found = {}
    for how, fused in (("eager", False), ("compiled", True)):
        one, two = (moved_bytes(config, vocab_size, layers, fused) for layers in (1, 2))
        more = config.model.num_layers - 1
        every = {name: one[name] + more * (two[name] - one[name]) for name in two}
        largest = sorted(every.items(), key=lambda item: -item[1])[:SHOWN]
        found[how] = {"all": sum(every.values()), "largest": dict(largest)}
    return found


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="llama_1.3b", help="run configuration, of one rank")
    parser.add_argument("--rank", type=number_from(1), default=512)
    parser.add_argument("--vocab_size", type=number_from(1), default=32100)
    parser.add_argument("--out", type=user_path, default=None, help="also write the JSON here")
    options = parser.parse_args(argv)
    found = {}
    for name in ("full", "switchlora"):
        words = ["--config", options.config, "--method.name", name]
        config = parse_arguments([*words, *(["--method.rank", str(options.rank)] if name != "full" else [])]).config
        found[name] = measure(config, options.vocab_size)
    publish({"setting": {"config": options.config, "rank": options.rank, "vocab_size": options.vocab_size},
             "bytes_per_micro_batch": found}, options.out)  # fmt: skip
