"""The package against the independent reference, float64, without DeepSpeed: 60 steps with the ring wrapping."""

from __future__ import annotations

import pytest
import torch

from megatron_switchlora.methods import SwitchLora
from megatron_switchlora.optim.schedules import lr_factor
from tests.numerics.pairing import differences, make_reference
from tests.plain import PlainRun, make_batches, small_config

STEPS = 60


@pytest.mark.parametrize(
    ("selection", "changes"),
    [
        pytest.param("ring", {}, marks=pytest.mark.full),
        (
            "ring",
            {"optim__weight_decay": 0.1, "method__rank": 5, "method__switch__freeze_steps": 1, "optim__dense_lr": 0.01},
        ),
        *(pytest.param(name, {}, marks=pytest.mark.full) for name in ("random", "independent")),
        ("ring", {"method__compute": "merged"}),
        pytest.param(
            "random", {"method__compute": "merged", "method__merged_cache": "recompute"}, marks=pytest.mark.full
        ),
        pytest.param(
            "ring", {"method__compute": "merged", "method__merged_cache": "accumulation"}, marks=pytest.mark.full
        ),
    ],
)
def test_sixty_steps_equal_the_reference(selection: str, changes: dict) -> None:
    config = small_config(
        **{"method__switch__selection": selection, "optim__lr": 0.02, "method__compute": "split", **changes}
    )
    run = PlainRun(config, torch.float64)
    assert isinstance(run.method, SwitchLora)
    reference = make_reference(config, run.method)
    dense_lr = config.optim.dense_lr or config.optim.lr
    total = 0
    for step, batch in enumerate(make_batches(config, STEPS)):
        factor = lr_factor(step, config.train.warmup_steps, config.train.steps)
        theirs = reference.step(
            step, list(batch.split(config.train.micro_batch_size)), config.optim.lr * factor, dense_lr * factor
        )
        loss, norm, switched = run.step(step, batch)
        assert switched == theirs["switched"]
        assert loss == pytest.approx(theirs["loss"], rel=1e-11)
        assert norm == pytest.approx(theirs["grad_norm"], rel=1e-9)
        total += switched
    worst = differences(reference, run.method, run.optimizer)
    print(selection, changes, total, worst)
    # every position and every candidate slot has been passed more than once: k_proj has 24 candidates
    assert total / 2 / 21 > 2 * 24
    # the reference computes in the split form; the merged form rounds otherwise, and Adam magnifies that
    assert max(worst.values()) < (1e-9 if config.method.compute == "split" else 1e-8)


@pytest.mark.parametrize("selection", ["ring", "random"])
def test_few_spare_slots(selection: str) -> None:
    """Four spare slots in k and v, four vectors a step: every row fetched ahead was written back by the step before."""
    config = small_config(method__switch__selection=selection, method__rank=20, optim__lr=0.002, model__num_layers=1)
    run = PlainRun(config, torch.float64)
    reference = make_reference(config, run.method)
    for step, batch in enumerate(make_batches(config, 20)):
        rate = config.optim.lr * lr_factor(step, config.train.warmup_steps, config.train.steps)
        reference.step(step, list(batch.split(config.train.micro_batch_size)), rate, rate)
        run.step(step, batch)
    worst = differences(reference, run.method, run.optimizer)
    print(selection, worst)
    assert max(worst.values()) < 1e-8
