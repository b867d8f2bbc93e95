"""What a run says when it begins."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_switchlora.checkpoint.resume import ResumePoint
from megatron_switchlora.distributed.mesh import lone_mesh
from megatron_switchlora.train import summary
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
