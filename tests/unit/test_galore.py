"""GaLore: equal to the package's optimizer where that is installed; state, checkpoint and plan in any case."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_switchlora.checkpoint.engine_state import state_slices
from megatron_switchlora.checkpoint.weights import Weights
from megatron_switchlora.config.ds_config import Zero
from megatron_switchlora.config.errors import UserError
from megatron_switchlora.config.run import RunConfig
from megatron_switchlora.methods import Galore, build_method, galore
from megatron_switchlora.model.llama.model import LlamaForCausalLM
from megatron_switchlora.optim.galore import GaloreAdamW, load_projector
from megatron_switchlora.optim.layout import plain_layout
from megatron_switchlora.planning.memory import checkpoint_bytes, memory_items
from tests.plain import VOCAB, PlainRun, make_batches, small_config
from tests.unit.test_convert import save

HERE = find_spec("galore_torch") is not None
NEEDS_PACKAGE = pytest.mark.skipif(not HERE, reason="galore-torch is not installed: pip install '.[galore]'")


class StandIn:
    """The package's projector of type std in a few lines."""

    ortho_matrix: Tensor | None = None

    def __init__(self, rank: int, update_proj_gap: int, scale: float, proj_type: str) -> None:
        assert proj_type == "std"
        self.rank, self.gap, self.scale = rank, update_proj_gap, scale

    def project(self, full_rank_grad: Tensor, iter: int) -> Tensor:
        tall = full_rank_grad.size(0) >= full_rank_grad.size(1)
        if iter % self.gap == 0:
            U, _, Vh = torch.linalg.svd(full_rank_grad, full_matrices=False)
            self.ortho_matrix = Vh[: self.rank] if tall else U[:, : self.rank]
        assert self.ortho_matrix is not None
        return full_rank_grad @ self.ortho_matrix.t() if tall else self.ortho_matrix.t() @ full_rank_grad

    def project_back(self, low_rank_grad: Tensor) -> Tensor:
        assert self.ortho_matrix is not None
        tall = low_rank_grad.size(0) >= low_rank_grad.size(1)
        return self.scale * (low_rank_grad @ self.ortho_matrix if tall else self.ortho_matrix @ low_rank_grad)


@pytest.fixture(params=["stand-in", pytest.param("package", marks=NEEDS_PACKAGE)])
def projector(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "stand-in":
        monkeypatch.setattr(galore, "load_projector", lambda: StandIn)


def config_of(**changes: Any) -> RunConfig:
    return small_config("galore", method__galore__update_gap=4, optim__lr=0.01, optim__weight_decay=0.1, **changes)


@NEEDS_PACKAGE
def test_equals_the_packages_adamw() -> None:
    from galore_torch import GaLoreAdamW

    generator = torch.Generator().manual_seed(0)
    shapes = [(30, 12), (12, 30), (16, 16)]
    ours = [torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)) for shape in shapes]
    theirs = [torch.nn.Parameter(param.detach().clone()) for param in ours]
    settings = {"rank": 5, "update_proj_gap": 4, "scale": 0.25, "proj_type": "std"}
    make = load_projector()
    projectors = {p: make(5, update_proj_gap=4, scale=0.25, proj_type="std") for p in ours}
    group = {"params": ours, "lr": 0.01, "weight_decay": 0.1}
    mine = GaloreAdamW([group], projectors, 5, beta1=0.9, beta2=0.999, eps=1e-8)
    mine.attach(plain_layout(ours))
    reference = GaLoreAdamW(
        [{"params": theirs, **settings}], lr=0.01, weight_decay=0.1, eps=1e-8, no_deprecation_warning=True
    )
    gap = 0.0
    for _ in range(12):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator, dtype=torch.float64)
            b.grad = a.grad.clone()
        mine.step()
        reference.step()
        gap = max(gap, *(float((a - b).detach().abs().max()) for a, b in zip(ours, theirs, strict=True)))
    print(f"\nafter 12 steps and 3 decompositions: parameters within {gap:.1e} of GaLoreAdamW")
    assert gap < 1e-12


def test_trains_in_a_low_rank_space(projector: None) -> None:
    run = PlainRun(config_of(optim__clip=0.0, model__intermediate_size=76))
    assert isinstance(run.method, Galore) and isinstance(run.optimizer, GaloreAdamW)
    linear = run.model.model.layers[0].mlp.up_proj
    run.optimizer.param_groups[0]["weight_decay"] = 0.0
    start = linear.weight.detach().clone()
    losses = []
    for step, batch in enumerate(make_batches(run.config, 12)):
        losses.append(run.step(step, batch)[0])
        if step == 3:
            update = torch.linalg.svdvals(linear.weight.detach() - start)
            assert int((update > 1e-4 * update[0]).sum()) == run.config.method.rank  # of one projector
    assert losses[-1] < losses[0] and len(set(losses)) == 12
    update = torch.linalg.svdvals(linear.weight.detach() - start)
    assert int((update > 1e-4 * update[0]).sum()) > run.config.method.rank
    state = run.optimizer.state[linear.weight]
    assert state["exp_avg"].shape == (76, 7) and state["projector"].shape == (7, 48) and float(state["row_step"]) == 12


@pytest.mark.parametrize("saved", [5, 8])
def test_resumes_to_the_bit(tmp_path: Path, projector: None, saved: int) -> None:
    """Between two decompositions, and right at one."""
    whole, resumed = PlainRun(config_of()), PlainRun(config_of(train__seed=9))
    resumed.config.train.seed = 0
    batches = make_batches(whole.config, 14)
    for step in range(saved):
        whole.step(step, batches[step])
    checkpoint = save(whole, tmp_path / "step")
    archive, weights = checkpoint.archive(), Weights(checkpoint)
    for name, param in whole.model.named_parameters():  # what an export and train.init_from read
        assert torch.equal(weights.read(name), param)
    plain = SimpleNamespace(model=resumed.model, optimizer=resumed.optimizer, method=resumed.method,
                            ds=SimpleNamespace(zero_optimization_stage=lambda: 0))  # fmt: skip
    with torch.no_grad():
        for held in state_slices(plain):  # type: ignore[arg-type]
            archive.fill(held)
    resumed.method.loaded()
    for step in range(saved, 14):
        assert whole.step(step, batches[step]) == resumed.step(step, batches[step])
    for a, b in zip(whole.params, resumed.params, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("changes", [{}, {"model__tie_embeddings": True, "model__num_kv_heads": 1, "method__rank": 12}])
def test_the_formulas_have_its_bytes(tmp_path: Path, projector: None, changes: dict[str, Any]) -> None:
    run = PlainRun(config_of(**changes))
    run.step(0, make_batches(run.config, 1)[0])
    archive = save(run, tmp_path / "step").archive()
    assert sum(archive.read(name).nbytes for name in archive.names()) == checkpoint_bytes(run.config, VOCAB)
    found = {item.kind: item.bytes for item in memory_items(run.config, VOCAB, 1, 1, Zero(0))}
    held = {key: sum(s[key].nbytes for s in run.optimizer.state.values() if key in s) for key in
            ("exp_avg", "exp_avg_sq", "projector", "row_step")}  # fmt: skip
    assert found["Adam moments, fp32"] == held["exp_avg"] + held["exp_avg_sq"]
    assert found["GaLore projectors, fp32"] == held["projector"]
    assert found["Adam step counters"] == held["row_step"]
    assert found["trainable parameters, fp32"] == sum(p.nbytes for p in run.params)
    assert "frozen W, fp32" not in found


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*sys.modules]:
        if name.split(".")[0] == "galore_torch":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "galore_torch", None)
    config = config_of()
    for act in (
        config.method.facts.require_packages,
        lambda: build_method(config, LlamaForCausalLM(config.model, VOCAB)),
    ):
        with pytest.raises(UserError, match=r"needs the package galore-torch.*pip install '.*\[galore\]'"):
            act()
    small_config("full").method.facts.require_packages()
