"""How many calls and copies a step's switch and AdamW take, whatever the number of layers."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_switchlora.config.model import ModelConfig
from megatron_switchlora.distributed.shard import Axis
from megatron_switchlora.lowrank.indices import Indices
from megatron_switchlora.methods import SwitchLora
from megatron_switchlora.optim import layout as layout_module
from megatron_switchlora.optim.head_clip import HeadClip
from tests.numerics.test_batched import RankRun
from tests.plain import small_config

# views, and what only makes a tensor
FREE = {
    "view", "slice", "split", "select", "narrow", "t", "transpose", "permute", "expand", "unsqueeze", "squeeze",
    "alias", "detach", "as_strided", "empty", "new_empty", "empty_like", "new_empty_strided", "_unsafe_view",
    "lift_fresh", "unbind", "is_pinned", "split_with_sizes", "_record_function_enter_new",
    "_record_function_exit", "promote_types",
}  # fmt: skip


class Calls(TorchDispatchMode):
    """Counts the calls that compute or copy."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in FREE:
            self.count[name] += 1
        return func(*args, **(kwargs or {}))


class StepCalls(NamedTuple):
    """Calls of the switch, the norm and AdamW in a step in which all layers switch; uploads of indices; blocks."""

    switch: Counter[str]
    norm: Counter[str]
    adamw: Counter[str]
    sent: int
    blocks: int


def calls_of_a_step(layers: int, layout: str, monkeypatch: pytest.MonkeyPatch) -> StepCalls:
    config = small_config(method__switch__interval0=4.0, method__rank=16, method__switch__freeze_steps=0)
    config.model = ModelConfig(hidden_size=64, intermediate_size=171, num_layers=layers, num_heads=2)
    config.method.switch.total_steps = 10**9
    monkeypatch.setattr(layout_module, "PART_ON_CPU", layout_module.PART)  # as on a device
    monkeypatch.setattr(HeadClip, "known_refusal", lambda self: None)
    run = RankRun(config, SwitchLora, torch.bfloat16, layout)
    run.step(0)
    sent: list[int] = []
    send = Indices.send
    monkeypatch.setattr(Indices, "send", lambda self, device: (sent.append(1), send(self, device)))
    for master in run.masters:
        master.grad = torch.ones_like(master)
    clip = run.optimizer.head_clip = HeadClip(1.0, 1, Axis(), Axis(), torch.device("cpu"))
    pieces = [piece for pieces in run.layout.by_master.values() for piece in pieces]
    with Calls() as switch:
        run.method.before_step(1)
    with Calls() as norm:
        clip.measure((piece.param, piece.block(piece.master.grad)) for piece in pieces)  # type: ignore[arg-type]
    with Calls() as adamw:
        for group in list(run.optimizer.param_groups):
            run.optimizer.param_groups = [group]
            run.optimizer.step()
    blocks = sum(map(len, run.layout.blocks.values()))
    return StepCalls(switch.count, norm.count, adamw.count, len(sent), blocks)


@pytest.mark.parametrize("layout", ["whole", "fourth of 8", "unfused"])
def test_calls_do_not_grow_with_layers(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = (calls_of_a_step(layers, layout, monkeypatch) for layers in (8, 24))
    totals = {name: getattr(many, name).total() for name in ("switch", "norm", "adamw")}
    print(f"\n{layout}: {totals}, {many.blocks} blocks", many.switch, many.adamw)
    assert few.switch.total() == many.switch.total() <= 80
    assert few.norm.total() == many.norm.total() <= 16
    assert few.sent == many.sent == 1
    assert layout == "unfused" or many.adamw.total() <= 84
    for count in (many.switch, many.norm, many.adamw):
        assert not count["_local_scalar_dense"]  # the host reads nothing
