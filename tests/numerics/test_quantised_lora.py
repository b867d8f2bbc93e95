"""LoRA over a frozen W in 4 bits: its start, its passes against float64, what its checkpoint gives, its plan."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_switchlora.checkpoint.weights import Weights, load_initial
from megatron_switchlora.config.ds_config import Zero
from megatron_switchlora.config.errors import UserError
from megatron_switchlora.config.rules import validate
from megatron_switchlora.hf.folders import merged_state_dict
from megatron_switchlora.lowrank.nf4 import dequantise
from megatron_switchlora.methods.lora import QuantisedLora
from megatron_switchlora.model.llama.model import LlamaForCausalLM
from megatron_switchlora.model.protocol import initialize_weights
from megatron_switchlora.planning.memory import checkpoint_bytes, memory_items
from tests.plain import VOCAB, PlainRun, make_batches, small_config
from tests.unit.test_convert import save

INITS = {
    "classic": {},
    "switchlora": {"method__alpha": 3.0},
    "pissa": {"method__alpha": 3.0},
    "lora_ga": {"method__rslora": True, "method__ga__samples": 8},
}


def quantised(init: str, **changes: object) -> PlainRun:
    changes = {"method__init": init, "method__base_precision": "nf4", **INITS[init], **changes}
    return PlainRun(small_config("lora", **changes))


@pytest.mark.parametrize("init", INITS)
def test_only_rounding_to_4_bits_changes_the_start(init: str) -> None:
    """W - s B A is rounded to the levels of its blocks: at most half the widest gap, 0.152 of a block's largest."""
    run = quantised(init)
    assert isinstance(run.method, QuantisedLora)
    dense = LlamaForCausalLM(run.config.model, VOCAB)
    initialize_weights(dense, run.config.train.seed)
    weights = dict(dense.named_parameters())
    for name, linear in run.method.linears.items():
        assert linear.quantised is not None and not hasattr(linear, "weight")
        error = (linear.effective_weight() - weights[f"{name}.weight"].detach()).abs()
        largest = linear.quantised.scales.amax(1, keepdim=True)
        assert bool((error <= 0.1520 * largest + 1e-6).all()), name
        assert float(error.max()) > 1e-4
        product = linear.scaling * linear.lora_B.detach().t() @ linear.lora_A.detach()
        assert bool(product.any()) == (init != "classic")


@pytest.mark.parametrize("init", ["classic", "lora_ga"])
def test_losses_and_gradients_are_those_of_the_levels_in_float64(init: str) -> None:
    """A dense float64 model has the matrices W + s B A, W from its codes. So dL/dA = s B dL/dW, dL/dB = s A dL/dW^T."""
    run = quantised(init)
    tokens = make_batches(run.config, 1)[0]
    assert isinstance(run.method, QuantisedLora)
    for step, batch in enumerate(make_batches(run.config, 3)):
        run.step(step, batch)
    run.optimizer.zero_grad()
    mine = run.model(tokens[:, :-1], tokens[:, 1:])
    mine.backward()
    dense = LlamaForCausalLM(run.config.model, VOCAB).double()
    own = dict(run.model.named_parameters())
    params = dict(dense.named_parameters())
    for name, param in params.items():
        if name in own:
            param.data.copy_(own[name].detach())
    for name, linear in run.method.linears.items():
        matrix = linear.quantised
        assert matrix is not None
        levels = dequantise(matrix.codes, matrix.scales, matrix.columns, matrix.levels).double()
        product = linear.lora_B.detach().double().t() @ linear.lora_A.detach().double()
        params[f"{name}.weight"].data.copy_(levels + linear.scaling * product)
    loss = dense(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    assert float(mine.detach()) == pytest.approx(float(loss.detach()), rel=1e-6)
    largest = 0.0
    for name, linear in run.method.linears.items():
        dW = params[f"{name}.weight"].grad
        assert dW is not None
        A, B = (factor.detach().double() for factor in (linear.lora_A, linear.lora_B))
        wanted = linear.scaling * B @ dW, linear.scaling * A @ dW.t()
        for factor, gradient in zip((linear.lora_A, linear.lora_B), wanted, strict=True):
            assert factor.grad is not None
            largest = max(largest, float((factor.grad - gradient).norm() / gradient.norm()))
    print(f"\n{init}: gradients within {largest:.1e}")
    assert largest < 1e-5


def test_it_learns() -> None:
    run = quantised("switchlora")
    losses = [run.step(step, batch)[0] for step, batch in enumerate(make_batches(run.config, 20))]
    assert losses[-1] < losses[0] - 0.1


def test_a_checkpoint_gives_what_the_run_computes(tmp_path: Path) -> None:
    """By the model's names, whole or in boxes; LoRA-GA's start is the rounded one. Another run starts from it."""
    run = quantised("lora_ga")
    first = merged_state_dict(run.model)
    for step, batch in enumerate(make_batches(run.config, 2)):
        run.step(step, batch)
    weights, state = Weights(save(run, tmp_path / "checkpoint")), merged_state_dict(run.model)
    assert weights.names() == [name for name, _ in LlamaForCausalLM(run.config.model, VOCAB).named_parameters()]
    for name in weights.names():
        torch.testing.assert_close(weights.read(name), state[name], rtol=0, atol=1e-6)
        assert weights.shape(name) == tuple(state[name].shape)
        if weights.adapted(name):
            box = weights.base(name)[3:9, 11:]
            assert torch.equal(weights.base(name, (3, 11), tuple(box.shape)), box)
            torch.testing.assert_close(weights.original(name), first[name], rtol=0, atol=1e-6)
    model = LlamaForCausalLM(run.config.model, VOCAB)
    load_initial(model, weights)
    tokens = make_batches(run.config, 1)[0]
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), run.model(tokens), rtol=1e-4, atol=1e-5)


def test_what_4_bits_refuse() -> None:
    for name, reason in (("switchlora", "would lose what it folds"), ("relora", "would lose what it folds"),
                         ("lte", "method.lte.base")):  # fmt: skip
        with pytest.raises(UserError, match=rf"method\.base_precision nf4 rounds .*{reason}"):
            validate(small_config(name, method__base_precision="nf4"))
    for changes in ({"method__compute": "merged"}, {"method__base_spread": "dp"}):
        with pytest.raises(UserError, match=r"W \+ sBA is never formed or gathered"):
            validate(small_config("lora", method__base_precision="nf4", **changes))
    with pytest.raises(UserError, match=r"multiples of 64 x 2 .* model\.intermediate_size 76 is not"):
        validate(small_config("lora", method__base_precision="nf4", model__hidden_size=128, parallel__tp=2))


def test_the_plan_holds_what_the_run_holds() -> None:
    run = quantised("lora_ga")
    assert isinstance(run.method, QuantisedLora)
    found = {item.kind: item.bytes for item in memory_items(run.config, VOCAB, 1, 1, Zero(0))}
    held = sum(linear.quantised.nbytes for linear in run.method.linears.values() if linear.quantised)
    assert found["frozen W, 4 bit"] == held and "frozen W, fp32" not in found and "W + sBA, fp32" not in found
    whole = small_config("lora", method__init="lora_ga", **INITS["lora_ga"])
    saved = sum(4 * linear.shape[0] * linear.shape[1] for linear in run.method.linears.values()) - held
    assert checkpoint_bytes(whole, VOCAB) - checkpoint_bytes(run.config, VOCAB) == saved
