"""Options of the adapters' start and rates: PiSSA and LoRA+."""

from __future__ import annotations

import pytest
import torch

from megatron_switchlora.config.ds_config import Zero
from megatron_switchlora.lowrank.init import principal_factors
from megatron_switchlora.methods import Lora, Relora, build_method
from megatron_switchlora.model.llama.model import LlamaForCausalLM
from megatron_switchlora.model.protocol import initialize_weights
from megatron_switchlora.optim.layout import RowLayout
from megatron_switchlora.optim.row_adamw import RowAdamW
from megatron_switchlora.planning.memory import memory_items
from tests.plain import VOCAB, PlainRun, make_batches, small_config


@pytest.mark.parametrize("method", ["lora", "relora"])
def test_pissa_starts_from_the_principal_part_and_keeps_the_function(method: str) -> None:
    config = small_config(method, method__init="pissa", method__alpha=3.0, method__rank=8)
    run = PlainRun(config)
    assert isinstance(run.method, Lora)
    dense = LlamaForCausalLM(config.model, VOCAB)
    initialize_weights(dense, config.train.seed)
    weights = dict(dense.named_parameters())
    for name, linear in run.method.linears.items():
        W = weights[f"{name}.weight"].detach()
        assert float((linear.effective_weight() - W).abs().max()) < 1e-6
        singular = torch.linalg.svdvals(W)
        left = torch.linalg.svdvals(linear.weight)
        assert torch.allclose(left[: len(singular) - 8], singular[8:], atol=1e-5)  # the rest stays
        product = linear.scaling * linear.lora_B.detach().t() @ linear.lora_A.detach()
        assert torch.allclose(torch.linalg.svdvals(product)[:8], singular[:8], atol=1e-5)
        A, B = linear.lora_A.detach(), linear.lora_B.detach()
        assert torch.allclose(A.norm(dim=1), B.norm(dim=1), rtol=1e-4)  # balanced: sqrt(S / s) each
        assert bool((A.gather(1, A.abs().argmax(1, keepdim=True)) > 0).all())
    losses = [run.step(step, batch)[0] for step, batch in enumerate(make_batches(config, 10))]
    assert losses[-1] < losses[0]


def test_principal_factors_do_not_depend_on_the_signs_of_the_decomposition() -> None:
    W = torch.randn(20, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    A, B = principal_factors(W, 12, 0.25)
    assert torch.allclose(0.25 * B.t() @ A, W)
    flipped_A, flipped_B = principal_factors(-W, 12, 0.25)
    assert torch.allclose(flipped_A, A) and torch.allclose(flipped_B, -B)


@pytest.mark.parametrize("method", ["lora", "relora", "switchlora"])
def test_lora_plus_moves_b_faster(method: str) -> None:
    """Without momentum's history the first step's size is the learning rate."""
    moved = {}
    for ratio in (1.0, 16.0):
        run = PlainRun(
            small_config(method, optim__lora_plus_ratio=ratio, method__switch__interval0=1e9, optim__clip=0.0)
        )
        assert isinstance(run.method, Lora)
        names = [group["name"] for group in run.optimizer.param_groups]
        assert names == (["matrices"] if ratio == 1 else ["lora_A", "lora_B"]) + ["dense", "norms"]
        assert len({id(p) for p in run.params}) == len(run.params) == len(list(run.model.parameters()))
        before = {p: p.detach().clone() for p in run.params}
        run.step(0, make_batches(run.config, 1)[0])
        linears = run.method.linears.values()
        for side, factors in (("A", [x.lora_A for x in linears]), ("B", [x.lora_B for x in linears])):
            moved[ratio, side] = max(float((p.detach() - before[p]).abs().max()) for p in factors)
        dense = run.model.model.embed_tokens.weight
        moved[ratio, "dense"] = float((dense.detach() - before[dense]).abs().max())
    assert moved[16.0, "B"] == pytest.approx(16 * moved[1.0, "B"], rel=1e-4)
    assert (moved[16.0, "A"], moved[16.0, "dense"]) == (moved[1.0, "A"], moved[1.0, "dense"])


def test_one_group_without_a_ratio() -> None:
    """The order of parameters is ZeRO's flat layout: rows of one length follow one another."""
    run = PlainRun(small_config("lora"))
    assert isinstance(run.optimizer, RowAdamW) and isinstance(run.method, Lora)
    wanted = [factor for x in run.method.linears.values() for factor in (x.lora_A, x.lora_B)]
    held = run.optimizer.param_groups[0]["params"]
    assert {id(factor) for factor in held} == {id(factor) for factor in wanted}
    lengths = [factor.size(1) for factor in held]
    assert lengths == sorted(lengths) and lengths[0] < lengths[-1]


def test_lora_plus_lowers_the_gradients_of_a_group_in_the_plan() -> None:
    """ZeRO's optimizer takes a group at a time."""
    found = {}
    for ratio in (1.0, 4.0):
        run = PlainRun(small_config("lora", optim__lora_plus_ratio=ratio))
        sizes = [sum(p.numel() for p in group["params"]) for group in run.optimizer.param_groups]
        items = {item.kind: item.bytes for item in memory_items(run.config, VOCAB, 1, 1, Zero(1))}
        found[ratio] = items["fp32 gradients of the step"]
        assert found[ratio] == 4 * max(sizes)
    assert found[4.0] < found[1.0]


@pytest.mark.parametrize("method", ["lora", "relora"])
def test_separate_masters_follow_what_is_rewritten(method: str) -> None:
    """ZeRO's and bf16's masters are other tensors: left behind, the next step would undo it."""
    config = small_config(method, method__init="pissa")
    model = LlamaForCausalLM(config.model, VOCAB)
    initialize_weights(model, 0)
    driver = build_method(config, model)
    assert isinstance(driver, Lora)
    optimizer, layout = driver.build_optimizer(), RowLayout()
    for param in driver.matrices():
        layout.add(param, torch.zeros(param.numel()), 0, 0, param.numel())
    optimizer.attach(layout)
    driver.start(optimizer)
    if isinstance(driver, Relora):
        driver._restart(1)
    for param in driver.matrices():
        assert torch.equal(optimizer.read_rows(param)["master"], param)
    assert all(float(linear.lora_A.detach().abs().max()) > 0 for linear in driver.linears.values())
