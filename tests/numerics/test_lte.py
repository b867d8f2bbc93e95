"""LTE heads in one process against a plain reference of its Algorithm 1, and what must hold of merges. Float64."""

from __future__ import annotations

import pytest
import torch

from megatron_switchlora.optim.lr import lr_factor
from tests.numerics.lte_pairs import head_batches, lte_config, lte_differences, make_lte_reference
from tests.plain import PlainRun, make_batches

STEPS = 40


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"method__merge_form": "reset"},
        {
            "method__local_heads": 4,
            "train__micro_batch_size": 4,
            "method__init": "switchlora",
            "method__alpha": 1.0,
            "optim__weight_decay": 0.1,
        },
        {"method__merge_interval": "never", "method__orthogonal_scale": "sqrt_r_n"},
    ],
)
def test_local_heads_equal_the_reference(changes: dict) -> None:
    config = lte_config(**{"method__local_heads": 2, **changes})
    run, reference = PlainRun(config, torch.float64), make_lte_reference(config)
    worst = 0.0
    for step, batch in enumerate(make_batches(config, STEPS)):
        factor = lr_factor(step, config.train.warmup_steps, config.train.steps)
        losses, norms = reference.step(
            step, head_batches(config, batch), config.optim.lr * factor, config.dense_lr * factor
        )
        loss, *_ = run.step(step, batch)
        assert run.optimizer.head_clip is not None
        worst = max(worst, abs(loss - sum(losses)))
        assert run.optimizer.head_clip.norms.tolist() == pytest.approx(norms, rel=1e-9)
    found = lte_differences(reference, run.method, run.optimizer)  # type: ignore[arg-type]
    print(changes, worst, found)
    assert worst < 1e-9
    assert max(found.values()) < 1e-9
