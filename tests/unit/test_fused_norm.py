"""NVIDIA apex's RMSNorm: what is taken for it, and that it computes what ours does where it is installed."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any, Optional

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_switchlora.model import fused_norm
from megatron_switchlora.model.elementwise import Elementwise
from megatron_switchlora.model.fused_norm import KERNELS, apex_norm
from megatron_switchlora.model.norm import HeadsNorm, RMSNorm
from megatron_switchlora.train import phases
from megatron_switchlora.train.phases import choose_elementwise

CPU = torch.device("cpu")


def stand_in(x: Tensor, weight: Tensor, shape: tuple[int, ...], eps: float) -> Tensor:
    return F.rms_norm(x, shape, weight, eps)


def wrong(x: Tensor, weight: Tensor, shape: tuple[int, ...], eps: float) -> Tensor:
    """Right but for the weight's gradient."""
    return F.rms_norm(x, shape, eps=eps) * weight.detach() + 0 * weight


def install(monkeypatch: pytest.MonkeyPatch, norm: Optional[Any], kernels: bool = True) -> None:
    """Put an `apex` in place: NVIDIA's has `norm` and kernels, PyPI's neither."""
    monkeypatch.setattr(fused_norm, "is_gpu", lambda device: True)
    for name in ("apex", "apex.normalization", "apex.normalization.fused_layer_norm", KERNELS):
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        if name.endswith("fused_layer_norm") and norm is not None:
            module.fused_rms_norm_affine = norm  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module if kernels or name != KERNELS else None)  # type: ignore[arg-type]


def test_only_nvidias_apex_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, stand_in)
    assert apex_norm(CPU) is stand_in
    monkeypatch.setattr(fused_norm, "is_gpu", lambda device: device.type == "cuda")
    assert apex_norm(CPU) is None  # not a GPU
    for norm in (wrong, None):  # it computes something else; it has no such norm
        install(monkeypatch, norm)
        assert apex_norm(CPU) is None


def test_pypis_apex_is_refused_without_being_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, stand_in)
    for name in [name for name in sys.modules if name == KERNELS or name.split(".")[0] == "apex"]:
        monkeypatch.delitem(sys.modules, name)

    looked_up: list[str] = []

    class Watching:
        def find_spec(self, name: str, *_: object) -> None:
            looked_up.append(name)

    monkeypatch.setattr(sys, "meta_path", [Watching(), *sys.meta_path])
    assert apex_norm(CPU) is None and looked_up == [KERNELS]


def test_it_is_used_where_nothing_compiles(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    monkeypatch.setattr(phases, "failure", lambda _: "no compiler")
    monkeypatch.setattr(phases, "apex_norm", lambda _: stand_in)
    gpu = torch.device("cuda")
    chosen = choose_elementwise("auto", gpu)
    assert chosen.fused_norm is stand_in and not chosen.compiled
    assert "(no compiler); norms run in the kernels of NVIDIA's apex." in capsys.readouterr().out
    assert choose_elementwise("off", gpu).fused_norm is None and choose_elementwise("auto", CPU).fused_norm is None
    monkeypatch.setattr(phases, "failure", lambda _: None)
    assert choose_elementwise("auto", gpu).fused_norm is None  # a compiled norm adds the residual too


def check(how: Elementwise, device: torch.device, dtype: torch.dtype, bound: float) -> None:
    """Norms and their gradients, alone and with the residual, are the eager ones; those of heads stay eager."""
    base = RMSNorm(64, 1e-6).to(device, dtype)
    base.weight.data.uniform_(0.5, 1.5)
    for norm in (base, HeadsNorm(base, 2).to(device, dtype)):
        results = []
        for elementwise in (how, Elementwise()):
            norm.elementwise = elementwise
            leaves = [torch.linspace(-2, 3, 4 * 5 * 64).view(4, 5, 64).sin().to(device, dtype) for _ in range(2)]
            x, delta = (leaf.requires_grad_() for leaf in leaves)
            total, y = norm.add(x, delta)
            outputs = (norm(x), total, y)
            weights = list(norm.parameters())
            gradients = torch.autograd.grad(outputs, [x, delta, *weights], [y.sin().detach() for y in outputs])
            results.append([*outputs, *gradients])
        assert all(torch.allclose(a, b, rtol=bound, atol=bound) for a, b in zip(*results, strict=True))


def test_norms_go_through_it() -> None:
    calls: list[tuple[int, ...]] = []

    def counted(x: Tensor, weight: Tensor, shape: tuple[int, ...], eps: float) -> Tensor:
        calls.append(shape)
        return stand_in(x, weight, shape, eps)

    check(Elementwise(fused_norm=counted), CPU, torch.float64, 1e-12)
    assert calls == [(64,), (64,)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.skipif(find_spec(KERNELS) is None, reason="NVIDIA's apex is not installed with its CUDA kernels")
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_apex_computes_what_ours_does(dtype: torch.dtype, bound: float) -> None:
    norm = apex_norm(torch.device("cuda"))
    assert norm is not None
    check(Elementwise(fused_norm=norm), torch.device("cuda"), dtype, bound)
