"""The merged form of an adapted linear against the split one: values, gradients, memory, FLOPs, options."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from megatron_switchlora.distributed.linear import ColumnParallelLinear
from megatron_switchlora.distributed.shard import Axis, named_generator
from megatron_switchlora.lowrank.linear import LowRankLinear
from megatron_switchlora.lowrank.merged import Form, merge, prefers_merged
from tests.plain import PlainRun, make_batches, small_config

M, N, R = 40, 56, 7
CACHES = ("micro_batch", "accumulation", "recompute")


def make_linear(compute: str, dtype: torch.dtype, cache: str = "micro_batch") -> LowRankLinear:
    base = ColumnParallelLinear(N, M, Axis())
    base.weight.data.normal_(0, 0.2, generator=named_generator(0, "W"))
    linear = LowRankLinear(base, R, 1 / R, Form(compute, cache))
    for name, factor in (("A", linear.lora_A), ("B", linear.lora_B)):
        factor.data.normal_(generator=named_generator(0, name))
    linear.weight = linear.weight.to(torch.promote_types(dtype, torch.float32))
    linear.lora_A.data, linear.lora_B.data = linear.lora_A.data.to(dtype), linear.lora_B.data.to(dtype)
    return linear


def forward_backward(linear: LowRankLinear, dtype: torch.dtype, tokens: int = 300) -> list[torch.Tensor]:
    """Loss, dx, dA, dB for random x [2, tokens / 2, N] and a random direction."""
    x = torch.randn(2, tokens // 2, N, generator=named_generator(0, "x")).to(dtype).requires_grad_()
    direction = torch.randn(2, tokens // 2, M, generator=named_generator(0, "dy")).to(dtype)
    loss = (linear(x) * direction).sum()
    loss.backward()
    assert x.grad is not None and linear.lora_A.grad is not None and linear.lora_B.grad is not None
    return [loss.detach(), x.grad, linear.lora_A.grad, linear.lora_B.grad]


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


@pytest.mark.parametrize("cache", CACHES)
def test_forms_agree_in_float64(cache: str) -> None:
    split = forward_backward(make_linear("split", torch.float64), torch.float64)
    merged = forward_backward(make_linear("merged", torch.float64, cache), torch.float64)
    gaps = [relative(a, b) for a, b in zip(merged, split, strict=True)]
    print(cache, gaps)
    assert max(gaps) < 1e-12


@pytest.mark.parametrize("cache", CACHES)
def test_forms_agree_in_bf16_within_rounding(cache: str) -> None:
    """Neither is further from the exact values than a few roundings to 8 bits."""
    exact = forward_backward(make_linear("split", torch.float64), torch.float64)
    bound = 4 * 2.0**-8
    for compute in ("split", "merged"):
        found = forward_backward(make_linear(compute, torch.bfloat16, cache), torch.bfloat16)
        assert all(tensor.dtype == torch.bfloat16 for tensor in found)
        gaps = [relative(a, b) for a, b in zip(found[1:], exact[1:], strict=True)]
        print(compute, cache, gaps)
        assert max(gaps) < bound


def test_w_eff_is_formed_from_the_fp32_base() -> None:
    """The product is rounded once, added to the fp32 W in fp32, and the sum is rounded once."""
    linear = make_linear("merged", torch.bfloat16)
    A, B = linear.lora_A.detach(), linear.lora_B.detach()
    found = merge(linear.weight, A, B, linear.scaling)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, (linear.weight + linear.scaling * (B.t() @ A).float()).bfloat16())
    assert not torch.equal(found, linear.weight.bfloat16() + linear.scaling * (B.t() @ A))
    exact = linear.weight.double() + linear.scaling * B.double().t() @ A.double()
    assert relative(found, exact) < 2.0**-8


@pytest.mark.parametrize(("compute", "allowed"), [("merged", False), ("split", True)])
def test_nothing_of_width_r_is_saved(compute: str, allowed: bool) -> None:
    linear = make_linear(compute, torch.float32)
    shapes: list[tuple[int, ...]] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(tensor.shape))
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        linear(torch.randn(2, 30, N, requires_grad=True))
    wide = [shape for shape in shapes if shape[-1] == R and shape[0] not in (M, N)]
    assert bool(wide) is allowed, shapes


def test_flops_are_the_formulas() -> None:
    tokens = 300
    expected = {
        ("split", "micro_batch"): tokens * (4 * M * N + 6 * R * (M + N)),
        ("merged", "micro_batch"): tokens * (4 * M * N + 4 * R * (M + N)) + 2 * M * N * R,
        ("merged", "recompute"): tokens * (4 * M * N + 4 * R * (M + N)) + 4 * M * N * R,
    }
    for (compute, cache), flops in expected.items():
        linear = make_linear(compute, torch.float32, cache)
        with FlopCounterMode(display=False) as counter:
            forward_backward(linear, torch.float32, tokens)
        assert counter.get_total_flops() == flops, (compute, cache)


@pytest.mark.parametrize("cache", ["micro_batch", "recompute"])
def test_auto_takes_the_cheaper_form(cache: str) -> None:
    for tokens in (10, 20, 30, 60, 100, 1000):
        costs = {}
        for compute in ("split", "merged", "auto"):
            with FlopCounterMode(display=False) as counter:
                forward_backward(make_linear(compute, torch.float32, cache), torch.float32, tokens)
            costs[compute] = counter.get_total_flops()
        assert costs["auto"] == min(costs["split"], costs["merged"]), (tokens, costs)
    assert prefers_merged(20, M, N, 0.5) and not prefers_merged(20, M, N, 1)  # kept over two micro-batches
    assert prefers_merged(48, M, N, 1) and not prefers_merged(12, M, N, 1)


def run_losses(**changes: Any) -> list[float]:
    config = small_config(optim__lr=0.002, **changes)
    run = PlainRun(config, torch.float64)
    run.model.checkpointing = config.train.activation_checkpointing
    losses = []
    for step, batch in enumerate(make_batches(config, 6)):
        losses.append(run.step(step, batch)[0])
        with torch.no_grad():  # inference between steps must not leave stale weights behind
            losses.append(float(run.model(batch[:, :-1], batch[:, 1:])))
    return losses


def test_options_change_nothing_over_training() -> None:
    """Four micro-batches a step, switches in every step, evaluation after each."""
    base = run_losses(method__compute="split")
    for cache in CACHES:
        for checkpointing in (False, True):
            found = run_losses(
                method__compute="merged", method__merged_cache=cache, train__activation_checkpointing=checkpointing
            )
            worst = max(abs(a / b - 1) for a, b in zip(found, base, strict=True))
            assert worst < 1e-11, (cache, checkpointing, worst)
