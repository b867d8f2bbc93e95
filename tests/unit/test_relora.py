"""ReLoRA: a restart keeps the function, begins the adapters anew, and the learning rate climbs back."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_switchlora.config.run import RunConfig
from megatron_switchlora.distributed.mesh import lone_mesh
from megatron_switchlora.methods import Lora, Relora
from megatron_switchlora.optim.pruning import kept_count, prune_moments
from megatron_switchlora.optim.schedules import jagged_factor, lr_factor
from tests.plain import PlainRun, make_batches, small_config


def relora(**changes: Any) -> RunConfig:
    return small_config("relora", method__relora__interval=6, method__relora__warmup=3, **changes)


def watch(run: PlainRun, seen: list[dict[str, float]]) -> None:
    """Look at the adapters around every restart."""
    method = run.method
    assert isinstance(method, Relora)
    restart = method._restart

    def watched(number: int) -> None:
        before = [linear.effective_weight().clone() for linear in method.linears.values()]
        rows = [run.optimizer.read_rows(factor) for factor in method.matrices()]
        restart(number)
        changes = [
            float((linear.effective_weight() - old).norm() / old.norm())
            for linear, old in zip(method.linears.values(), before, strict=True)
        ]
        after = [run.optimizer.read_rows(factor) for factor in method.matrices()]
        seen.append(
            {
                "change": max(changes),
                "steps": max(float(values["row_step"].max()) for values in after),
                "B": max(float(linear.lora_B.detach().abs().max()) for linear in method.linears.values()),
                "stale_A": sum(torch.equal(a["master"], b["master"]) for a, b in zip(rows, after, strict=True)),
                **{key: max(float(values[key].abs().max()) for values in after) for key in ("exp_avg", "exp_avg_sq")},
                "had": min(float(values["exp_avg"].abs().max()) for values in rows),
                "master_gap": max(
                    float((values["master"] - factor.detach()).abs().max())
                    for values, factor in zip(after, method.matrices(), strict=True)
                ),
            }
        )

    method._restart = watched  # type: ignore[method-assign]


@pytest.mark.parametrize("moments", ["zero", "prune"])
def test_a_restart_keeps_the_function_and_begins_anew(moments: str) -> None:
    run = PlainRun(relora(method__relora__moments=moments, optim__lr=0.01))
    seen: list[dict[str, float]] = []
    watch(run, seen)
    losses = [run.step(step, batch)[0] for step, batch in enumerate(make_batches(run.config, 20))]
    assert losses[-1] < losses[0]
    assert len(seen) == 3
    for found in seen:
        assert found["change"] < 1e-6, found
        assert found["steps"] == found["B"] == found["stale_A"] == found["master_gap"] == 0, found
        assert found["had"] > 0
        assert (found["exp_avg"] > 0) == (found["exp_avg_sq"] > 0) == (moments == "prune")


def test_every_restart_draws_another_classic_a_alike_on_every_run() -> None:
    draws = []
    for _ in range(2):
        run = PlainRun(relora())
        assert isinstance(run.method, Relora)
        linear = next(iter(run.method.linears.values()))
        drawn = [linear.lora_A.detach().clone()]
        for number in (1, 2):
            run.method._restart(number)
            drawn.append(linear.lora_A.detach().clone())
        draws.append(drawn)
        for A in drawn:
            assert float(A.std()) == pytest.approx((3 * linear.in_features) ** -0.5, rel=0.1)
    assert all(torch.equal(a, b) for a, b in zip(*draws, strict=True))
    assert len({float(A[0, 0]) for A in draws[0]}) == 3


def test_until_the_first_restart_it_is_classic_lora() -> None:
    """Unlike A = B = 0, which would train nothing. The first loss after the restart is LoRA's too."""
    found = {}
    for name, init in (("relora", None), ("lora", "classic")):
        changes = {"method__relora__interval": 5, "method__relora__warmup": 2, "optim__lr": 0.02}
        run = PlainRun(small_config(name, method__init=init, **changes))
        assert isinstance(run.method, Lora)
        found[name] = [run.step(step, batch)[0] for step, batch in enumerate(make_batches(run.config, 7))]
        assert all(float(factor.detach().abs().max()) > 0 for factor in run.method.matrices())
    assert found["relora"][:5] == found["lora"][:5]
    assert found["relora"][5] == pytest.approx(found["lora"][5], rel=1e-6)
    assert found["relora"][6] != found["lora"][6]


def test_jagged_cosine() -> None:
    factors = [jagged_factor(step, 4, 24, 8, 2) for step in range(24)]
    plain = [lr_factor(step, 4, 24) for step in range(24)]
    assert factors[:8] == plain[:8]  # the first warm-up and its cycle
    for start in (8, 16):
        assert factors[start : start + 2] == [0.5 * plain[start + 2], plain[start + 2]]
        assert factors[start + 2 : start + 8] == plain[start + 2 : start + 8]
    assert [jagged_factor(step, 4, 24, 8, 0) for step in range(24)] == plain
    run = PlainRun(relora())
    assert [run.method.lr_factor(k) for k in range(12)] == [jagged_factor(k, 5, 60, 6, 3) for k in range(12)]


@pytest.mark.parametrize(("share", "count"), [(0.1, 1433), (0.001, 14)])
def test_pruning_keeps_the_largest_share(share: float, count: int) -> None:
    run = PlainRun(relora(model__intermediate_size=2047, model__num_layers=1))
    for step, batch in enumerate(make_batches(run.config, 2)):  # the first moves B alone
        run.step(step, batch)
    factor = max(run.method.matrices(), key=torch.Tensor.numel)
    assert factor.shape == (7, 2047)
    before = run.optimizer.read_rows(factor)
    prune_moments(run.optimizer, [factor], share, lone_mesh())
    after = run.optimizer.read_rows(factor)
    for key in ("exp_avg", "exp_avg_sq"):
        kept = after[key] != 0
        assert int(kept.sum()) == kept_count(factor, share) == count
        assert torch.equal(after[key][kept], before[key][kept])
        assert before[key][kept].abs().min() > before[key][~kept].abs().max()
    assert kept_count(factor, 1e-9) == 1
