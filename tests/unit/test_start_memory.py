"""The start of a run on a GPU: the host holds a few tensors at a time, never the whole model or bank."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_switchlora.distributed.mesh import lone_mesh
from megatron_switchlora.methods import build_method
from megatron_switchlora.model.protocol import build_initialized, build_model, initialize_weights
from tests.plain import VOCAB, small_config


class HostBytes(TorchDispatchMode):
    """Bytes of the tensors in host memory, now and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage not in self._known:
            self._known.add(storage)
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._free, storage.nbytes())

    def _free(self, count: int) -> None:
        self.now -= count


def start(name: str, layers: int, **changes: Any) -> tuple[HostBytes, Any]:
    """Build model and method of a run whose device is elsewhere."""
    config = small_config(name, model__num_layers=layers, **changes)
    counted = HostBytes()
    with counted:
        model = build_initialized(config.model, VOCAB, None, 0, torch.device("meta"))
        method = build_method(config, model, lone_mesh())
    return counted, method


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["full", "lora", "switchlora", "mhlora", "lte"])
def test_the_host_holds_a_few_tensors_whatever_the_depth(name: str, precision: str) -> None:
    """At 1.3B the largest tensor has 263 MB."""
    few, many = (start(name, layers, train__precision=precision)[0] for layers in (2, 12))
    largest = 4 * 76 * 48
    print(f"\n{name} {precision}: at most {many.most:,} bytes, {many.most / largest:.1f} of the largest tensor")
    assert many.most <= few.most and largest <= many.most <= 4 * largest
    assert many.now < largest


def test_a_bank_in_host_memory_is_there_in_the_precision_of_compute() -> None:
    counted, method = start("switchlora", 12, train__precision="bf16", method__switch__bank_device="host")
    bank = sum(held.rows.nbytes for held in method.bank.held.values())
    assert {held.rows.dtype for held in method.bank.held.values()} == {torch.bfloat16}
    assert bank <= counted.now <= counted.most <= bank + 4 * 4 * 76 * 48


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_values_are_those_of_a_start_on_the_cpu(precision: str) -> None:
    """The candidates are cast when they are drawn, not later: the same bits."""
    config = small_config("switchlora", train__precision=precision)
    model = build_initialized(config.model, VOCAB, None, 0, torch.device("cpu"))
    other = build_model(config.model, VOCAB)
    initialize_weights(other, 0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    method: Any = build_method(config, model, lone_mesh())
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    for layer, (name, linear) in enumerate(method.linears.items()):
        for side in "AB":
            drawn = method._draw_vectors(side, name, method.schedule.candidates[layer])
            rows = method.bank.held[side, layer].rows
            assert rows.dtype == dtype and torch.equal(rows, drawn.to(dtype))
        assert linear.lora_A.dtype == linear.lora_B.dtype == torch.float32
