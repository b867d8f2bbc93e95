"""Norm, rotary embedding and gated activation: their own backward passes against autograd's, and compiled ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_switchlora.config.errors import UserError
from megatron_switchlora.model import elementwise
from megatron_switchlora.model.elementwise import FUNCTIONS, Elementwise
from megatron_switchlora.train.phases import choose_elementwise

EPS = 1e-6
B, S, D = 3, 5, 48
BARS = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 2e-2}


def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    high = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * (high * torch.rsqrt(high.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def plain_head_norm(x: Tensor, weight: Tensor) -> Tensor:
    """Each head's samples by its own weight, as `HeadsNorm` has it."""
    return torch.stack([plain_norm(x[head], weight[head, 0, 0]) for head in range(len(x))])


def plain_add_norm(x: Tensor, delta: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return x + delta, plain_norm(x + delta, weight)


def plain_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As transformers write it."""
    left, right = x.chunk(2, dim=-1)
    return x * torch.cat((cos, cos), -1) + torch.cat((-right, left), dim=-1) * torch.cat((sin, sin), -1)


def drawn(dtype: torch.dtype) -> dict[str, list[Tensor]]:
    """Return inputs by function; those of the rotation are heads that lie behind one another, as projections give."""
    torch.manual_seed(0)
    x, y, z = (torch.randn(B, S, D, dtype=torch.float64).to(dtype) for _ in range(3))
    heads = x.unflatten(-1, (4, -1)).transpose(1, 2)
    angles = torch.rand(S, D // 8, dtype=torch.float64)
    weight = 1 + torch.rand(D, dtype=torch.float64).to(dtype)
    tables = [angles.cos().to(dtype), angles.sin().to(dtype)]
    by_head = [x.unflatten(-1, (4, -1)), torch.stack([weight[:12], *weight[12:36].view(2, 12)])[:, None, None]]
    return {
        "norm": [x, weight],
        "norm of heads": by_head,
        "add_norm": [x, y, weight],
        "rotary": [heads, *tables],
        "swiglu": [y, z],
    }


def results(function: Callable[..., Tensor | tuple[Tensor, ...]], inputs: list[Tensor]) -> list[Tensor]:
    """Return the outputs, and the gradients of all inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    listed = list(outputs) if isinstance(outputs, tuple) else [outputs]
    torch.manual_seed(1)
    grads = torch.autograd.grad(listed, leaves, [torch.randn_like(y) for y in listed], allow_unused=True)
    return [*listed, *(grad for grad in grads if grad is not None)]


def fixed(tables: Sequence[Tensor]) -> list[Tensor]:
    return [table.detach() for table in tables]


def of(how: Elementwise) -> dict[str, tuple[Callable, Callable]]:
    """Return (ours, as autograd derives it) by name."""
    return {
        "norm": (lambda x, w: how.norm(x, w, EPS), plain_norm),
        "norm of heads": (lambda x, w: how.norm(x, w, EPS), plain_head_norm),
        "add_norm": (lambda x, d, w: how.add_norm(x, d, w, EPS), plain_add_norm),
        "rotary": (lambda x, *a: how.rotary(x, *fixed(a)), lambda x, *a: plain_rotary(x, *fixed(a))),
        "swiglu": (how.swiglu, lambda gate, up: F.silu(gate) * up),
    }  # fmt: skip


def check(how: Elementwise, dtype: torch.dtype, names: Sequence[str]) -> None:
    for name in names:
        ours, plain = of(how)[name]
        mine, expected = (results(each, drawn(dtype)[name]) for each in (ours, plain))
        assert len(mine) == len(expected) >= 2
        for a, b in zip(mine, expected, strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape
            gap = float((a - b).detach().abs().max() / b.abs().max())
            assert gap < BARS[dtype], (name, gap)


@pytest.mark.parametrize("dtype", BARS, ids=str)
def test_backward_passes_equal_autograd(dtype: torch.dtype) -> None:
    check(Elementwise(), dtype, ("norm", "norm of heads", "add_norm", "rotary", "swiglu"))


def test_norms_and_activation_are_the_plain_ones_to_the_bit() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for name in ("norm", "norm of heads", "add_norm", "swiglu"):
            ours, plain = of(Elementwise())[name]
            inputs = drawn(dtype)[name]
            mine, expected = ours(*inputs), plain(*inputs)
            for a, b in zip(*((y,) if isinstance(y, Tensor) else y for y in (mine, expected)), strict=True):
                assert torch.equal(a, b)


def test_only_inputs_are_kept_for_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a norm x and 1 / rms(x); of a rotation no activation at all; of a compiled activation gate and up."""
    monkeypatch.setattr(elementwise, "_compiled", lambda function: function)
    inputs, found = drawn(torch.float32), {}
    for name in ("norm", "rotary", "swiglu"):
        kept: list[Tensor] = []
        leaves = [x.detach().requires_grad_(x.dim() != 2) for x in inputs[name]]
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            of(Elementwise(compiled=True))[name][0](*leaves)
        found[name] = sum(x.numel() for x in kept)
    assert found["norm"] == B * S * D + B * S + D and found["rotary"] == 2 * S * D // 8
    assert found["swiglu"] == 2 * B * S * D


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_every_function_is_one_graph(function: Callable) -> None:
    """torch.compile finds nothing in it that it would have to leave out."""
    graphs = []
    compiled = torch.compile(function, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    inputs = drawn(torch.float32)
    x, delta, weight = inputs["add_norm"]
    scale = x.abs().mean(-1, keepdim=True)
    arguments = {
        "norm_forward": (x, weight, EPS), "norm_backward": (delta, x, weight, scale),
        "add_norm_forward": (x, delta, weight, EPS), "add_norm_backward": (x, delta, x, weight, scale),
        "rotate": tuple(inputs["rotary"]), "swiglu_forward": (x, delta), "swiglu_backward": (x, delta, x),
    }[function.__name__]  # fmt: skip
    expected, found = function(*arguments), compiled(*arguments)
    pairs = zip(*((y,) if isinstance(y, Tensor) else y for y in (found, expected)), strict=True)
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in pairs) and len(graphs) == 1


@pytest.mark.full
@pytest.mark.timeout(600)
def test_compiled_kernels_equal_autograd() -> None:
    """With torch's C++ backend; the other functions are made of the same operations, and take as long to compile."""
    check(Elementwise(compiled=True), torch.float32, ("norm", "swiglu"))


def test_a_compiler_that_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("no compiler\nat all")

    monkeypatch.setattr(elementwise, "_compiled", lambda _: fails)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    with pytest.raises(UserError, match=r"train\.compile on: torch\.compile fails here \(no compiler\)"):
        choose_elementwise("on", torch.device("cpu"))
    assert not choose_elementwise("auto", torch.device("cpu")).compiled and not capsys.readouterr().out
    gpu = torch.device("cuda")
    monkeypatch.setattr("megatron_switchlora.train.phases.failure", lambda _: "no compiler")
    assert not choose_elementwise("auto", gpu).compiled and "compiles nothing" in capsys.readouterr().out
    assert not choose_elementwise("off", gpu).compiled and not capsys.readouterr().out
