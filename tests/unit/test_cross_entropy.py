"""The output layer and its loss in chunks, against torch's on all logits at once (over ranks: test_tp_model.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_switchlora.distributed import cross_entropy
from megatron_switchlora.distributed.cross_entropy import linear_cross_entropy
from megatron_switchlora.distributed.shard import Axis, Split

T, D, V = 50, 24, 37
BARS = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2e-2}


def drawn(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x, weight = (torch.randn(n, D, dtype=torch.float64).to(dtype).requires_grad_() for n in (T, V))
    return x, weight, torch.randint(0, V, (T,))


def plainly(function: Callable[..., Any], *inputs: Any) -> Any:
    """Run a function that would be compiled."""
    return function(*inputs)


@pytest.mark.parametrize("dtype", BARS, ids=str)
@pytest.mark.parametrize("tokens", [16, 1, T], ids=["uneven chunks", "a token each", "one chunk"])
@pytest.mark.parametrize("run", [None, plainly], ids=["in place", "in passes"])
def test_it_equals_the_loss_of_all_logits(
    dtype: torch.dtype, tokens: int, run: Optional[cross_entropy.Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the scale that accumulation gives the backward pass."""
    monkeypatch.setattr(cross_entropy, "CHUNK", tokens * V)
    x, weight, targets = drawn(dtype)
    high = torch.promote_types(dtype, torch.float32)
    plain = F.cross_entropy((x @ weight.t()).to(high), targets)
    split = Split(0, V, Axis())
    ours = linear_cross_entropy(x.unflatten(0, (5, -1)), weight, targets.unflatten(0, (5, -1)), split, run)
    wanted, found = (torch.autograd.grad(loss / 4, (x, weight)) for loss in (plain, ours))
    assert ours.dtype == high and float((ours / plain - 1).abs()) < max(BARS[dtype] / 100, 1e-14)
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype == dtype
        assert float((a - b).abs().max() / b.abs().max()) < BARS[dtype]


def test_only_what_needs_a_gradient_gets_one() -> None:
    x, weight, targets = drawn(torch.float32)
    split = Split(0, V, Axis())
    (dx,) = torch.autograd.grad(linear_cross_entropy(x, weight, targets, split), x)
    frozen = linear_cross_entropy(x, weight.detach(), targets, split)
    assert [kept is None for kept in frozen.grad_fn.saved_tensors] == [False, True]
    frozen.backward()
    assert torch.equal(x.grad, dx)
    with torch.no_grad():
        evaluated = linear_cross_entropy(x, weight, targets, split)
    assert torch.equal(evaluated, frozen) and not evaluated.requires_grad


def test_logits_exist_a_chunk_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """No product has more than a chunk's rows and all columns."""
    monkeypatch.setattr(cross_entropy, "CHUNK", 16 * V)
    x, weight, targets = drawn(torch.float32)
    sizes = []
    for_real = cross_entropy._losses
    monkeypatch.setattr(cross_entropy, "_losses", lambda z, *rest: sizes.append(z.shape) or for_real(z, *rest))
    linear_cross_entropy(x, weight, targets, Split(0, V, Axis())).backward()
    assert sizes == [(16, V), (16, V), (16, V), (2, V)]


def test_columns_of_padding_are_left_out_in_both_forms() -> None:
    """Of 37 columns 32 are real; the others would be the largest."""
    x, weight, targets = drawn(torch.float64)
    split = Split(0, 32, Axis(), V)
    assert split.local == V and split.real == 32
    targets = targets % 32
    with torch.no_grad():
        weight[32:] *= 100
    wanted = F.cross_entropy(x @ weight[:32].t(), targets)
    for run in (None, plainly):
        found = linear_cross_entropy(x, weight, targets, split, run)
        dx, dweight = torch.autograd.grad(found, (x, weight))
        assert float((found - wanted).abs()) < 1e-13
        assert torch.allclose(dx, torch.autograd.grad(wanted, x, retain_graph=True)[0], atol=1e-14)
        assert not dweight[32:].any()


@pytest.mark.parametrize("name", ["row_maxima", "row_sums", "row_gradients"])
def test_every_function_is_one_graph(name: str) -> None:
    """torch.compile finds nothing in it that it would have to leave out."""
    graphs: list[Any] = []
    function = getattr(cross_entropy, name)
    compiled = torch.compile(function, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    logits, local, here = torch.randn(5, 8), torch.arange(5)[:, None], torch.arange(5) % 2 == 0
    top, sums = torch.zeros(5), torch.ones(2, 5)
    arguments = {
        "row_maxima": (logits, 7), "row_sums": (logits, top, local, here, 7),
        "row_gradients": (logits, top, sums, local, here, 7, 0.5),
    }[name]  # fmt: skip
    assert torch.equal(compiled(*arguments), function(*arguments)) and len(graphs) == 1
