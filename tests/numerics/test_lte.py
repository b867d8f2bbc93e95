"""LTE heads in one process against a plain reference of its Algorithm 1, and what must hold of merges. Float64."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_switchlora.config.run import RunConfig
from megatron_switchlora.distributed.shard import Axis
from megatron_switchlora.methods.lte.heads import LocalLte, Merging
from megatron_switchlora.methods.lte.merging import mean_products
from megatron_switchlora.optim.schedules import lr_factor
from megatron_switchlora.train.diagnose import find_bad_layer
from tests.numerics.lte_pairs import (
    equal_runs,
    exact_mean,
    exact_weight,
    head_batches,
    lte_config,
    lte_differences,
    make_lte_reference,
)
from tests.plain import PlainRun, make_batches, peak_of, small_config

full = pytest.mark.full


@pytest.mark.parametrize(
    ("steps", "changes"),
    [
        (12, {}),
        pytest.param(40, {}, marks=full),
        pytest.param(40, {"method__lte__merge_form": "reset"}, marks=full),
        pytest.param(
            40,
            {"method__lte__local_heads": 4, "train__micro_batch_size": 4, "method__init": "switchlora",
             "method__alpha": 1.0, "optim__weight_decay": 0.1}, marks=full,
        ),
        pytest.param(40, {"method__lte__merge_interval": "never", "method__orthogonal_scale": "sqrt_r_n"}, marks=full),
        (7, {"method__lte__base": "nf4"}),
        pytest.param(10, {"method__lte__base": "nf4", "method__lte__merge_form": "reset"}, marks=full),
        pytest.param(  # s = 256
            4,
            {"method__lte__local_heads": 32, "train__micro_batch_size": 32, "train__global_batch_size": 32,
             "method__alpha": 7 * 256.0, "optim__lr": 2e-5, "optim__dense_lr": 0.002}, marks=full,
        ),
    ],
)  # fmt: skip
def test_local_heads_equal_the_reference(steps: int, changes: dict) -> None:
    config = lte_config(**{"method__lte__local_heads": 2, **changes})
    run, reference = PlainRun(config, torch.float64), make_lte_reference(config)
    worst = 0.0
    for step, batch in enumerate(make_batches(config, steps)):
        factor = lr_factor(step, config.train.warmup_steps, config.train.steps)
        losses, norms = reference.step(
            step, head_batches(config, batch), config.optim.lr * factor, config.dense_lr * factor
        )
        loss, *_ = run.step(step, batch)
        assert run.optimizer.head_clip is not None
        worst = max(worst, abs(loss - sum(losses)))
        assert run.optimizer.head_clip.norms.tolist() == pytest.approx(norms, rel=1e-9)
    assert isinstance(run.method, LocalLte)
    found = lte_differences(reference, run.method, run.optimizer)
    print(changes, worst, found)
    assert worst < 1e-9
    assert max(found.values()) < 1e-9


def means(method: Any) -> list[Tensor]:
    return [mean.clone() for mean in method.mean_weights()]


def descend(run: PlainRun, batch: Tensor, factors_by: float, lr: float, step: int) -> None:
    """One step of plain SGD without a clip; the factors' gradients are divided first."""
    run.optimizer.zero_grad()
    run.model(batch[:, :-1], batch[:, 1:]).sum().backward()
    for param in run.params:
        scale = 1 / factors_by if param.rows else 1.0  # type: ignore[attr-defined]
        param.data.sub_(param.grad, alpha=lr * scale)  # type: ignore[arg-type]
    run.method.after_step(step)


def test_resetless_merged_each_step_is_mhlora() -> None:
    """SGD, every head on the same batch, no clip, a head's factor N in its gradient taken out."""
    heads = 3
    changes: dict[str, Any] = {
        "method__lte__local_heads": heads,
        "method__mhlora__heads": heads,
        "train__micro_batch_size": 3,
        "train__global_batch_size": 3,
    }
    lte = PlainRun(lte_config(method__lte__merge_interval=1, **changes), torch.float64)
    mhlora = PlainRun(small_config("mhlora", method__alpha=14.0, method__compute="split", **changes), torch.float64)
    for step, batch in enumerate(make_batches(mhlora.config, 10)):
        descend(lte, batch.repeat(heads, 1), heads, 0.01, step)
        descend(mhlora, batch, 1, 0.01, step)
    worst = 0.0
    for mean, linear in zip(means(lte.method), mhlora.method.linears.values(), strict=True):  # type: ignore[attr-defined]
        worst = max(worst, float((mean - linear.effective_weight()).abs().max()))
    moved = max(float(linear.lora_B.abs().max()) for linear in mhlora.method.linears.values())  # type: ignore[attr-defined]
    print(worst, moved)
    assert moved > 1e-4
    assert worst < 1e-13


@full
def test_resetless_merged_each_step_is_mhlora_with_adam() -> None:
    changes: dict[str, Any] = {
        "method__lte__local_heads": 2,
        "method__mhlora__heads": 2,
        "optim__clip": 0.0,
        "optim__eps": 1e-20,
        "optim__dense_lr": 0.001,
    }
    lte = PlainRun(lte_config(method__lte__merge_interval=1, **changes), torch.float64)
    mhlora = PlainRun(
        small_config("mhlora", method__alpha=14.0, method__compute="split", optim__lr=0.002, **changes), torch.float64
    )
    lte.config.train.global_batch_size *= 2
    lte.config.train.micro_batch_size *= 2
    for step, batch in enumerate(make_batches(mhlora.config, 10)):
        a, *_ = lte.step(step, batch.repeat(2, 1))
        b, *_ = mhlora.step(step, batch)
        assert a / 2 == pytest.approx(b, rel=1e-6)
    for mean, linear in zip(means(lte.method), mhlora.method.linears.values(), strict=True):  # type: ignore[attr-defined]
        assert float((mean - linear.effective_weight()).abs().max()) < 1e-6


def test_reset_merged_each_step_never_moves_A() -> None:
    run = PlainRun(
        lte_config(method__lte__local_heads=2, method__lte__merge_form="reset", method__lte__merge_interval=1),
        torch.float64,
    )
    assert isinstance(run.method, LocalLte)
    before = [A.detach().clone() for linear in run.method.linears.values() for A in linear.lora_A]
    weights = [linear.weight.clone() for linear in run.method.linears.values()]
    for step, batch in enumerate(make_batches(run.config, 5)):
        run.step(step, batch)
    after = [A.detach() for linear in run.method.linears.values() for A in linear.lora_A]
    assert all(map(torch.equal, before, after))
    assert all(bool((linear.weight != w).any()) for linear, w in zip(run.method.linears.values(), weights, strict=True))


@pytest.mark.parametrize(
    ("form", "base"),
    [
        ("reset", "nf4"),
        ("resetless", "fp32"),
        *(pytest.param(*pair, marks=full) for pair in (("reset", "fp32"), ("resetless", "nf4"))),
    ],
)
def test_a_merge_keeps_the_mean(form: str, base: str) -> None:
    """In fp32: what the merge makes every head compute is the mean of what they computed before, as formed in float64
    from base and factors."""
    config = lte_config(
        method__lte__local_heads=2,
        method__lte__merge_form=form,
        method__lte__base=base,
        method__lte__merge_interval="never",
        method__lte__redraw_A=form == "reset", optim__lr=0.01,
    )  # fmt: skip
    run = PlainRun(config)
    assert isinstance(run.method, LocalLte)
    for step, batch in enumerate(make_batches(config, 6)):
        run.step(step, batch)
        if step % 3 == 2:
            if base == "fp32":
                before = [exact_mean(linear, linear.heads) for linear in run.method.linears.values()]
            else:
                before = [mean.double() for mean in means(run.method)]
            old_A = run.method.linears["model.layers.0.mlp.up_proj"].lora_A[1].detach().clone()
            spread = max(float(linear.lora_B[0].abs().max()) for linear in run.method.linears.values())
            run.method.merge(step)
            for mean, after, linear in zip(before, means(run.method), run.method.linears.values(), strict=True):
                change = float((after - mean).abs().max() / mean.abs().max())
                assert change < 1e-6
                if base == "fp32":
                    gap = (exact_weight(linear, 0) - mean).abs().max() / mean.abs().max()
                    assert float(gap) < 1e-6
                assert_heads_compute(linear, mean.float(), exact=base == "fp32")
            assert spread > 1e-3
            redrawn = not torch.equal(old_A, run.method.linears["model.layers.0.mlp.up_proj"].lora_A[1].detach())
            assert redrawn == (form == "reset")
            now = run.method.linears["model.layers.0.mlp.up_proj"].lora_A
            assert not torch.equal(now[0], now[1])  # heads draw each their own
    dense = run.method.dense()
    assert all(torch.equal(a, b) for a, b in dense.values())


def assert_heads_compute(linear: Any, mean: Tensor, exact: bool) -> None:
    """Each head's layer applies the mean, or its 4-bit form."""
    x = torch.eye(mean.size(1)).unsqueeze(0).repeat(linear.heads, 1, 1)
    for y in linear(x):
        if exact:
            assert float((y.t() - mean).abs().max()) < 1e-5
        else:
            assert float((y.t() - linear.quantised.dequantised(torch.float32)).abs().max()) < 1e-5
            error = float((y.t() - mean).norm() / mean.norm())
            assert 0.01 < error < 0.12  # of 4 bits


@pytest.mark.parametrize("compute", [pytest.param("split", marks=full), "merged"])
def test_one_head_never_merged_is_lora_to_the_bit(compute: str) -> None:
    same: dict[str, Any] = {"method__init": "classic", "method__alpha": 7.0, "method__compute": compute}
    same["optim__dense_lr"] = 0.002
    alone = small_config("lte", method__lte__merge_interval="never", **same)
    assert equal_runs(alone, small_config("lora", **same)) == 0.0


def test_one_head_of_switches_never_merged_is_switchlora_to_the_bit() -> None:
    alone = small_config(
        "lte", method__lte__inner="switchlora", method__lte__merge_interval="never", optim__dense_lr=0.002
    )
    assert equal_runs(alone, small_config("switchlora")) == 0.0


def least_squares_error(interval: int, target_rank: int) -> float:
    """|W + B A - target|^2 of a 32 x 32 layer at r = 4 after 2,000 SGD steps on it, the loss of inputs whose covariance
    is the identity; its model's method merges, with B <- 0 and A redrawn."""
    shape = {"model__hidden_size": 32, "model__intermediate_size": 32, "model__num_layers": 1, "model__num_kv_heads": 4}
    adapter = {"method__rank": 4, "method__alpha": 4.0, "method__init": "classic"}
    run = PlainRun(
        lte_config(method__lte__merge_form="reset", method__lte__redraw_A=True, **shape, **adapter), torch.float64
    )
    assert isinstance(run.method, Merging)
    layer = run.method.linears["model.layers.0.self_attn.q_proj"]
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(32, 32, dtype=torch.float64, generator=generator) / 32**0.5
    if target_rank < 32:
        target = torch.randn(32, target_rank, dtype=torch.float64, generator=generator) @ target[:target_rank] / 32**0.5
    everything = torch.eye(32, dtype=torch.float64)
    layer.weight.zero_()
    for step in range(2000):
        error = (layer(everything) - target.T).pow(2).sum()
        gradients = torch.autograd.grad(error, (layer.lora_A, layer.lora_B))
        with torch.no_grad():
            for factor, gradient in zip((layer.lora_A, layer.lora_B), gradients, strict=True):
                factor.sub_(gradient, alpha=0.2)
        if interval and (step + 1) % interval == 0:
            run.method.merge(step)
    return float((layer.effective_weight() - target).detach().pow(2).sum())


@pytest.mark.parametrize("target_rank", [32, 8])
def test_least_squares_reaches_a_target_of_higher_rank_only_with_merges(target_rank: int) -> None:
    """LTE's Figure 8, one head."""
    found = {interval: least_squares_error(interval, target_rank) for interval in (0, 100, 25, 5)}
    print(found)
    if target_rank == 32:
        assert found[0] > 10 and found[100] < 1e-2 and found[25] < 1e-4 and found[5] < 1e-14
    else:  # two merges would do
        assert found[0] > 1 and max(found[interval] for interval in (100, 25, 5)) < 1e-5


def test_heads_start_apart_and_head_0_as_lora() -> None:
    run = PlainRun(lte_config(method__lte__local_heads=3, train__micro_batch_size=3, train__global_batch_size=6))
    alone = PlainRun(small_config("lora", method__init="semi_orthogonal"))
    assert isinstance(run.method, Merging)
    for linear, other in zip(run.method.linears.values(), alone.method.linears.values(), strict=True):  # type: ignore[attr-defined]
        first, second, third = linear.lora_A
        assert torch.equal(first, other.lora_A)
        assert float((first - second).abs().max()) > 0.1 < float((second - third).abs().max())
        gram = second @ second.T
        assert torch.allclose(gram, torch.eye(7) * second.size(1) / 7, atol=1e-4)


def test_rows_of_A_are_scaled_as_the_paper_has_it() -> None:
    run = PlainRun(lte_config(method__lte__local_heads=2, method__orthogonal_scale="sqrt_r_n"))
    for linear in run.method.linears.values():  # type: ignore[attr-defined]
        A = linear.lora_A[1].detach()
        assert torch.allclose(A @ A.T, torch.eye(7) * 7 / A.size(1), atol=1e-5)


class Factors:
    """A layer with a head's factors, for a merge."""

    scaling = 2.0

    def __init__(self, size: int, rank: int) -> None:
        self.A, self.B = torch.randn(rank, size), torch.randn(rank, size)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.A, self.B


@pytest.mark.parametrize("traffic", ["factors", "delta"])
def test_a_merge_never_holds_the_products_of_all_heads(traffic: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most bytes at once while a layer of 512 x 512 is merged over 2 and 16 heads: within a few of its own size."""
    monkeypatch.setattr(dist, "all_gather", lambda outputs, mine, group: [out.copy_(mine) for out in outputs])
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, group: None)
    size, rank = 512, 4
    for heads in (2, 16):
        config = lte_config(method__lte__merge_traffic=traffic, parallel__lte_heads=heads)
        layers = [Factors(size, rank)]
        found: list[Tensor] = []
        merge = partial(mean_products, layers, config, Axis(heads, 0))
        highest = peak_of(partial(lambda results, merge: results.extend(merge()), found, merge))
        wanted = 2.0 * layers[0].B.t() @ layers[0].A / (1 if traffic == "factors" else heads)
        assert torch.allclose(found[0], wanted, rtol=1e-4, atol=1e-4)
        factors = 4 * 2 * rank * size * heads
        assert 4 * size**2 <= highest < 2.1 * (4 * size**2) + 3 * factors, (heads, highest)


def test_the_bad_layer_of_a_head_is_named() -> None:
    run = PlainRun(lte_config(method__lte__local_heads=2))
    batch, cpu = make_batches(run.config, 1)[0], torch.device("cpu")
    assert find_bad_layer(run.model, [batch], cpu) is None
    run.method.linears["model.layers.1.mlp.up_proj"].lora_A[1].data.fill_(math.nan)  # type: ignore[attr-defined]
    assert "model.layers.1.mlp.up_proj.lora_A.1" in str(find_bad_layer(run.model, [batch], cpu))


def test_lora_plus_gives_B_of_local_heads_its_rate() -> None:
    run = PlainRun(lte_config(method__lte__local_heads=2, optim__lora_plus_ratio=16.0))
    assert isinstance(run.method, LocalLte)
    rates = {param: group["base_lr"] for group in run.optimizer.param_groups for param in group["params"]}
    for linear in run.method.linears.values():
        assert [rates[B] / rates[A] for A, B in zip(linear.lora_A, linear.lora_B, strict=True)] == [16.0, 16.0]


def test_a_bad_gradient_of_local_heads_is_named() -> None:
    """Their losses are several, and finite here."""
    run = PlainRun(lte_config(method__lte__local_heads=2))
    tokens = make_batches(run.config, 1)[0][:2]
    assert find_bad_layer(run.model, [tokens], torch.device("cpu")) is None
    bad = run.model.model.layers[1].mlp.down_proj.lora_A[1]
    bad.register_hook(lambda gradient: gradient * math.inf)
    found = find_bad_layer(run.model, [tokens], torch.device("cpu"))
    assert found == "the gradient of model.layers.1.mlp.down_proj.lora_A.1"


def kept_bytes(config: RunConfig) -> int:
    """What autograd keeps for the backward pass beside parameters and buffers."""
    run = PlainRun(config)
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    tokens = make_batches(config, 1)[0][:2]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = run.model(tokens[:, :-1], tokens[:, 1:]).sum()
    for tensor in [*run.model.parameters(), *run.model.buffers()]:
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    loss.backward()
    return sum(kept.values())


def test_a_base_in_4_bits_is_not_kept_dequantised() -> None:
    config = lte_config(method__lte__local_heads=2)
    wanted = kept_bytes(config)
    config.method.lte.base = "nf4"
    assert kept_bytes(config) <= wanted
