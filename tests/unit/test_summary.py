"""What a run says when it begins."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_switchlora.train import summary
from tests.plain import small_config


@pytest.mark.parametrize(("works", "said"), [(True, "bitsandbytes"), (False, "plain torch, much slower than")])
def test_who_dequantises_is_told(monkeypatch: pytest.MonkeyPatch, works: bool, said: str) -> None:
    monkeypatch.setattr(summary, "bitsandbytes_works", lambda device: works)
    for base in ("fp32", "nf4"):
        config = small_config("lte", method__base=base)
        trainer: Any = SimpleNamespace(
            config=config, counts=SimpleNamespace(trainable=1, full_total=2), start=SimpleNamespace(checkpoint=None),
            mesh=SimpleNamespace(size=lambda axis: 1), device=torch.device("cpu"), train_store=[0], val_store=[0],
            data=SimpleNamespace(unigram_val_ppl=2.0), last_step=config.train.steps,
        )  # fmt: skip
        lines = summary.opening_words(trainer)
        assert any(f"dequantised by {said}" in line for line in lines) == (base == "nf4")
