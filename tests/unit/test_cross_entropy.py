"""The output layer and its loss in chunks, against torch's on all logits at once (over ranks: test_tp_model.py)."""

from __future__ import annotations

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


@pytest.mark.parametrize("dtype", BARS, ids=str)
@pytest.mark.parametrize("tokens", [16, 1, T], ids=["uneven chunks", "a token each", "one chunk"])
def test_it_equals_the_loss_of_all_logits(dtype: torch.dtype, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the scale that accumulation gives the backward pass."""
    monkeypatch.setattr(cross_entropy, "CHUNK", tokens * V)
    x, weight, targets = drawn(dtype)
    high = torch.promote_types(dtype, torch.float32)
    plain = F.cross_entropy((x @ weight.t()).to(high), targets)
    ours = linear_cross_entropy(x.unflatten(0, (5, -1)), weight, targets.unflatten(0, (5, -1)), Split(0, V, Axis()))
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
