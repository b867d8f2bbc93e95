"""What a run reports when it begins and when it ends."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_switchlora.checkpoint.resume import ResumePoint
from megatron_switchlora.config.command_line import parse_arguments
from megatron_switchlora.distributed.mesh import lone_mesh
from megatron_switchlora.train import summary
from tests.pages import ROOT, blocks
from tests.plain import small_config


@pytest.mark.parametrize(("works", "said"), [(True, "bitsandbytes"), (False, "plain torch, much slower than")])
def test_who_dequantises_is_told(monkeypatch: pytest.MonkeyPatch, works: bool, said: str) -> None:
    monkeypatch.setattr(summary, "bitsandbytes_works", lambda device: works)
    for base in ("fp32", "nf4"):
        config = small_config("lte", method__lte__base=base)
        context: Any = SimpleNamespace(
            config=config, counts=SimpleNamespace(trainable=1, full_total=2), device=torch.device("cpu"),
            train_samples=[0], val_samples=[0], data=SimpleNamespace(unigram_val_ppl=2.0),
            last_step=config.train.steps, ranks=SimpleNamespace(local_size=1),
        )  # fmt: skip
        lines = summary.describe_start(context, lone_mesh(), ResumePoint())
        assert any(f"dequantised by {said}" in line for line in lines) == (base == "nf4")


def test_the_quick_start_ends_as_the_documentation_shows() -> None:
    """The run of docs/getting-started.md, from its counts and records."""
    config = parse_arguments([f"--config={ROOT / 'launch' / 'configs' / 'cpu_quickstart.yaml'}"]).config
    context: Any = SimpleNamespace(
        config=config, counts=SimpleNamespace(trainable=558_864, full_total=1_291_536), vocab_size=1024,
        last_step=config.train.steps, data=SimpleNamespace(unigram_val_ppl=394.48),
    )  # fmt: skip
    mesh: Any = SimpleNamespace(size=lambda axis: 2 if axis == "dp" else 1)
    record = {"loss": 3.7, "tokens_per_second": 15_164, "dp_bytes": 4 * 558_864}
    run: Any = SimpleNamespace(path="runs/switchlora-20261122-225808", history=[record])
    shown = blocks(ROOT / "docs" / "getting-started.md", "")[0].text
    assert summary.describe_end(context, mesh, run, math.log(38.65), 90) + "\n" == shown
