"""The switch of all layers at once and AdamW by blocks: to the bit what layer by layer and piece by piece give."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Optional

import pytest
import torch
from torch import Tensor, nn

from megatron_switchlora.config.run import RunConfig
from megatron_switchlora.distributed.mesh import Mesh, lone_mesh
from megatron_switchlora.distributed.slices import TensorSlice
from megatron_switchlora.lowrank.merged import merge
from megatron_switchlora.lowrank.spread import GatheredMatrix
from megatron_switchlora.methods import SwitchLora
from megatron_switchlora.model.llama.model import LlamaForCausalLM
from megatron_switchlora.model.protocol import initialize_weights
from tests.layouts import LAYOUTS, write_back
from tests.numerics.per_layer import PerLayerSwitchLora
from tests.plain import VOCAB, small_config


class RankRun:
    """One rank's model, method and optimizer over a layout, fed with drawn gradients."""

    def __init__(
        self, config: RunConfig, kind: type[SwitchLora], dtype: torch.dtype, layout: str, mesh: Optional[Mesh] = None
    ) -> None:
        self.model = LlamaForCausalLM(config.model, VOCAB)
        initialize_weights(self.model, 0)
        self.method = kind(config, self.model, mesh or lone_mesh())
        for param in self.model.parameters():
            param.data = param.data.to(dtype)
        self.optimizer = self.method.build_optimizer()
        self.layout, self.masters = LAYOUTS[layout](self.optimizer)
        self.optimizer.attach(self.layout)
        self.method.start(self.optimizer)
        write_back(self.layout)

    def step(self, step: int) -> int:
        for number, master in enumerate(self.masters):
            generator = torch.Generator().manual_seed(1000 * step + number)
            master.grad = torch.randn(master.shape, generator=generator).to(master.dtype)
        switched = self.method.before_step(step)
        groups = self.optimizer.param_groups
        for group in groups:  # as ZeRO does
            group["lr"] = 0.01 / (step + 1)
            self.optimizer.param_groups = [group]
            self.optimizer.step()
        self.optimizer.param_groups = groups
        write_back(self.layout)
        self.method.after_step(step)
        return switched

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.model.named_parameters()
        yield from self.model.named_buffers()
        yield from self.method.bank.tensors()
        for name, param in self.model.named_parameters():
            for key, value in self.optimizer.read_rows(param).items():
                yield f"{name}:{key}", value


class OldOrder(SwitchLora):
    """Orders factors by layer, as runs before the order by row length did."""

    def matrices(self) -> list[nn.Parameter]:
        return [factor for linear in self.linears.values() for factor in (linear.lora_A, linear.lora_B)]


CASES = [
    ("ring", torch.float32, "plain", {}),
    ("random", torch.bfloat16, "unfused", {}),
    ("independent", torch.bfloat16, "whole", {"optim__weight_decay": 0.1}),
    ("ring", torch.bfloat16, "second of 3", {"optim__weight_decay": 0.1, "method__switch__freeze_steps": 0}),
    ("random", torch.float32, "first of 3", {"method__switch__bank_device": "host"}),
    ("independent", torch.float32, "fourth of 8", {"optim__lora_plus_ratio": 4.0}),
    ("random", torch.float32, "plain", {"method__rank": 24, "method__switch__interval0": 30.0}),
    ("independent", torch.float32, "unfused", {"method__switch__interval0": 60.0, "optim__weight_decay": 0.1}),
]


@pytest.mark.parametrize(("selection", "dtype", "layout", "changes"), CASES)
def test_all_at_once_equals_layer_by_layer(selection: str, dtype: torch.dtype, layout: str, changes: dict) -> None:
    config = small_config(**{"method__switch__selection": selection, **changes})
    batched, reference = (RankRun(config, kind, dtype, layout) for kind in (SwitchLora, PerLayerSwitchLora))
    switched = 0
    for step in range(12):
        switched += batched.step(step)
        assert reference.step(step) >= 0
        for (name, mine), (_, theirs) in zip(batched.tensors(), reference.tensors(), strict=True):
            assert torch.equal(mine, theirs), (step, name, float((mine - theirs).abs().max()))
    assert switched > 40


RANKS = ("first of 3", "second of 3", "third of 3")


def slices_of(run: RankRun) -> Iterator[tuple[TensorSlice, tuple[slice, ...]]]:
    """What the rank holds of the optimizer's state, and where it lies in the whole tensor."""
    for name, param in run.model.named_parameters():
        for held in run.optimizer.slices(name, param, None):
            yield held, tuple(slice(at, at + n) for at, n in zip(held.offset, held.tensor.shape, strict=True))


def test_state_moves_between_the_orders() -> None:
    """A checkpoint holds boxes of whole tensors: ranks with factors by row length resume what others wrote by layer."""
    config = small_config()
    before, after = ([RankRun(config, kind, torch.bfloat16, rank) for rank in RANKS] for kind in (OldOrder, SwitchLora))
    whole: dict[str, Tensor] = {}
    for run in before:
        for step in range(3):
            run.step(step)
        for held, box in slices_of(run):
            whole.setdefault(held.name, torch.full(held.shape, torch.nan))[box] = held.tensor
    assert not any(values.isnan().any() for values in whole.values())
    for run in after:
        for held, box in slices_of(run):
            held.tensor.copy_(whole[held.name][box])
    for name, param in before[0].model.named_parameters():
        goal = {"master": name, "exp_avg": f"{name}:exp_avg", "exp_avg_sq": f"{name}:exp_avg_sq"}
        read = [run.optimizer.read_rows(dict(run.model.named_parameters())[name]) for run in after]
        for key, stored in goal.items():
            assert torch.equal(sum(each[key] for each in read), whole[stored]), (name, key)  # type: ignore[arg-type]
        steps = torch.stack([each["row_step"] for each in read]).amax(0)
        assert torch.equal(steps, whole[f"{name}:row_step"]) and param.shape == whole[name].shape
    factor = next(name for name in whole if name.endswith("gate_proj.lora_B"))
    places = [{held.name for held, _ in slices_of(run)} for run in (before[0], after[0])]
    assert (factor in places[0]) != (factor in places[1])  # the orders do differ


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_on_several_ranks_are_those_of_one(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three data ranks, each alone, with 32 rows of 76 and 16 of 48 and 24: the last ranks have padding, or nothing
    else. Sent is nothing here: each rank forms its rows of W + sBA."""
    monkeypatch.setattr(GatheredMatrix, "gather", lambda self: Alone())
    precision = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    spread = small_config(method__base_spread="dp", train__precision=precision, train__global_batch_size=24)
    whole = RankRun(small_config(train__precision=precision), SwitchLora, dtype, "plain")
    meshes = [Mesh({"lte": 1, "dp": 3, "tp": 1}, {"lte": 0, "dp": rank, "tp": 0}, {}) for rank in range(3)]
    ranks = [RankRun(spread, SwitchLora, dtype, "plain", mesh) for mesh in meshes]
    for step in range(12):
        assert whole.step(step) == ranks[0].step(step) == ranks[1].step(step) == ranks[2].step(step) > 0
    for rank in ranks:
        rank.method.renew_weights()
    for name, linear in whole.method.linears.items():
        merged = merge(linear.weight, *linear.factors(), linear.scaling)
        parts = [rank.method.linears[name] for rank in ranks]
        for part in parts:
            assert part.owned is not None and part.gathered is not None
            rows = slice(part.owned.start, part.owned.start + part.owned.real)
            assert torch.equal(part.owned.unpadded(part.weight), linear.weight[rows])
            assert torch.equal(part.owned.unpadded(part.gathered.own), merged[rows])
            assert not part.weight[part.owned.real :].any() and not part.gathered.own[part.owned.real :].any()
        assert sum(part.owned.real for part in parts if part.owned) == len(merged)


class Alone:
    """An exchange with nobody."""

    def wait(self) -> None:
        pass
