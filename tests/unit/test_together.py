"""Linears that take the same x run at once: against each layer alone, and that against the code it replaced."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Optional

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_switchlora.distributed.linear import ColumnParallelLinear, RowParallelLinear, apply_together
from megatron_switchlora.distributed.shard import Axis, named_generator
from megatron_switchlora.lowrank.linear import LowRankLinear
from megatron_switchlora.lowrank.merged import Form, merge
from megatron_switchlora.lowrank.rows import joined

TOKENS, N, R = 300, 56, 7
SIZES = (40, 24, 24)  # q and fewer heads of k and v
CACHES = ("micro_batch", "accumulation", "recompute")
KINDS = [("plain", ""), ("merged", "micro_batch"), ("merged", "accumulation"), ("merged", "recompute"), ("split", "")]
aten = torch.ops.aten
ADDS = {aten.add.Tensor, aten.add_.Tensor}
COPIES = {aten.cat.default, aten.clone.default, aten.copy_.default, aten._to_copy.default}
PRODUCTS = {aten.mm.default, aten.mm.out, aten.addmm.default, aten.addmm.out}


class Alone(torch.autograd.Function):
    """The merged form as one layer computed it before layers ran together."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, B: Tensor, weight: Tensor, scaling: float) -> Tensor:
        merged = merge(weight, A, B, scaling)
        ctx.scaling = scaling
        ctx.save_for_backward(x, A, B, merged)
        return F.linear(x, merged)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Optional[Tensor], ...]:
        x, A, B, merged = ctx.saved_tensors
        flat_x, flat_dy = x.reshape(-1, x.size(-1)), dy.reshape(-1, dy.size(-1))
        dA = torch.addmm(A, (flat_dy @ B.t()).t(), flat_x, beta=0, alpha=ctx.scaling)
        dB = torch.addmm(B, (flat_x @ A.t()).t(), flat_dy, beta=0, alpha=ctx.scaling)
        return dy @ merged, dA, dB, None, None


class Launches(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[func] += 1
        return func(*args, **(kwargs or {}))


def make_linears(kind: str, cache: str, dtype: torch.dtype, sizes: Sequence[int] = SIZES) -> list[nn.Module]:
    linears: list[nn.Module] = []
    for number, size in enumerate(sizes):
        linear: nn.Module = ColumnParallelLinear(N, size, Axis())
        if kind != "plain":
            linear = LowRankLinear(linear, R, 1 / R, Form(kind, cache or "micro_batch"))  # type: ignore[arg-type]
        for name, tensor in [*linear.named_parameters(), *linear.named_buffers()]:
            tensor.data.normal_(0, 0.2, generator=named_generator(number, name))
        linears.append(linear.to(dtype))
    return linears


def one_by_one(linears: Sequence[nn.Module], x: Tensor, entered: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return tuple(linear(x, *partial) for linear, partial in zip(linears, entered, strict=True))


def run(apply: Callable[..., tuple[Tensor, ...]], linears: Sequence[nn.Module]) -> tuple[list[Tensor], list[Tensor]]:
    """Return all y, then dx and the gradients of all parameters."""
    dtype = next(linears[0].parameters()).dtype
    x = torch.randn(2, TOKENS // 2, N, generator=named_generator(0, "x")).to(dtype).requires_grad_()
    outputs = apply(linears, x, [linear.partial_parameters() for linear in linears])  # type: ignore[operator]
    draw = named_generator(0, "dy")
    directions = [torch.randn(y.shape, generator=draw).to(dtype) for y in outputs]
    torch.autograd.backward(outputs, directions)
    gradients = [x.grad, *(param.grad for linear in linears for param in linear.parameters())]
    assert all(gradient is not None for gradient in gradients)
    return [y.detach() for y in outputs], gradients  # type: ignore[return-value]


def gap(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize(("kind", "cache"), KINDS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-13), (torch.bfloat16, 2.0**-7)])
def test_together_is_each_alone(kind: str, cache: str, dtype: torch.dtype, bound: float) -> None:
    outputs, gradients = run(apply_together, make_linears(kind, cache, dtype))
    wanted, expected = run(one_by_one, make_linears(kind, cache, dtype))
    assert all(map(torch.equal, outputs, wanted))
    gaps = [gap(a, b) for a, b in zip(gradients, expected, strict=True)]
    print(kind, cache, dtype, f"{max(gaps):.1e}")
    assert max(gaps) < bound
    assert not any(map(torch.equal, gradients[:1], expected[:1])) or kind == "split"  # dx is summed in another way


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_alone_is_what_it_was(dtype: torch.dtype, cache: str) -> None:
    """o and down, to the bit."""

    def before(linears: Sequence[Any], x: Tensor, _: object) -> tuple[Tensor, ...]:
        return tuple(Alone.apply(x, each.lora_A, each.lora_B, each.weight, each.scaling) for each in linears)

    found = run(one_by_one, make_linears("merged", cache, dtype, SIZES[:1]))
    wanted = run(before, make_linears("merged", cache, dtype, SIZES[:1]))
    assert all(
        torch.equal(a, b) for mine, old in zip(found, wanted, strict=True) for a, b in zip(mine, old, strict=True)
    )


@pytest.mark.parametrize(("kind", "most", "alone"), [("plain", 9, 11), ("merged", 17, 23)])
def test_fewer_launches_and_no_additions(kind: str, most: int, alone: int) -> None:
    """Three layers, forward and backward; the factors follow one another in memory, as in ZeRO's flat buffer."""
    counts = {}
    for name, apply in (("together", apply_together), ("alone", one_by_one)):
        linears = make_linears(kind, "micro_batch", torch.float32)
        if kind == "merged":
            joined([linear.lora_A for linear in linears])  # type: ignore[misc]
        with Launches() as launches:
            run(apply, linears)
        counts[name] = {func: count for func, count in launches.seen.items() if func in ADDS | COPIES | PRODUCTS}
    print({name: {str(func): count for func, count in each.items()} for name, each in counts.items()})
    assert sum(counts["together"].values()) == most and sum(counts["alone"].values()) == alone
    assert not ADDS & counts["together"].keys() and sum(counts["alone"].get(func, 0) for func in ADDS) == 2


def test_only_what_computes_alike_runs_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that differ, subclasses and layers with hooks run on their own."""
    groups: list[int] = []
    for owner in (ColumnParallelLinear, LowRankLinear):
        inner = owner.together

        def watched(linears: Any, *rest: Any, inner: Any = inner) -> Any:
            outputs = inner(linears, *rest)
            groups.append(0 if outputs is None else len(linears))
            return outputs

        monkeypatch.setattr(owner, "together", staticmethod(watched))

    class Doubled(ColumnParallelLinear):
        def forward(self, x: Tensor, *entered: Tensor) -> Tensor:
            return 2 * super().forward(x)

    def groups_of(linears: Sequence[nn.Module]) -> list[int]:
        groups.clear()
        run(apply_together, linears)
        return list(groups)

    plain, merged = make_linears("plain", "", torch.float32), make_linears("merged", "", torch.float32)
    assert groups_of(plain) == [3] and groups_of(merged) == [3]
    assert groups_of([plain[0], merged[1]]) == [] and groups_of([merged[0], plain[1]]) == []
    mixed = make_linears("auto", "", torch.float32, (40, 40 * N))  # more tokens than one of them has to repay W_eff
    few = torch.ones(1, 45, N)
    assert [each._merges(few) for each in mixed] == [True, False]  # type: ignore[operator]
    groups.clear()
    apply_together(mixed, few, [(), ()])
    assert groups == [0]
    subclass = [Doubled(N, 8, Axis()), Doubled(N, 8, Axis())]
    assert groups_of(subclass) == []
    assert groups_of([merged[0], *make_linears("split", "", torch.float32)]) == [0]
    seen: list[nn.Module] = []
    with plain[1].register_forward_hook(lambda module, *_: seen.append(module)):
        assert groups_of(plain) == [] and seen == [plain[1]]
    row = LowRankLinear(RowParallelLinear(N, 8, Axis()), R, 1.0, Form("merged"))
    assert LowRankLinear.together([row, row], few, [(), ()]) is None
