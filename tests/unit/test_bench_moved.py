"""`switchlora bench moved`: what a kernel reads and writes is counted; the 1.3B model's bytes may fall, not rise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_switchlora.model.elementwise import norm_forward
from megatron_switchlora.study.benchmarks.moved import Fused, MovedBytes, main, moved_bytes
from tests.plain import small_config

CEILINGS = {  # GB of a micro-batch of 12 x 512 tokens, bf16; rank 512 forms W + sBA once in it
    "full": {"eager": 138.0, "compiled": 39.5},
    "switchlora": {"eager": 148.2, "compiled": 49.7},
}


def test_a_kernel_reads_its_inputs_and_writes_its_results() -> None:
    with FakeTensorMode(), MovedBytes() as counter:
        x, weight = torch.empty(8, 4), torch.empty(4)
        x.t().add_(1.0)
        assert counter.by_operator == {"add_": 2 * 128}
        x.copy_(torch.empty(8, 4, dtype=torch.bfloat16))
        assert counter.by_operator["copy_"] == 64 + 128
        x + torch.empty(1, 4).expand(8, 4)
        assert counter.by_operator["add"] == 128 + 16 + 128, "what is expanded is read once"
        x @ x.t()
        before = counter.by_operator.total()
        Fused(counter).run(norm_forward, x, weight, 1e-6)
        assert counter.by_operator.total() - before == counter.by_operator["norm_forward"] == 128 + 16 + 128 + 32
        assert "mm" not in counter.by_operator and "mul" not in counter.by_operator


def test_every_layer_moves_the_same() -> None:
    config = small_config("switchlora", method__compute="merged")
    one, two, three = (moved_bytes(config, 61, layers, True).total() for layers in (1, 2, 3))
    assert three - two == two - one > 0


def test_the_bytes_of_the_large_model_do_not_rise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--out", str(tmp_path / "moved.json")])
    assert capsys.readouterr().out
    found = json.loads((tmp_path / "moved.json").read_text())["bytes_per_micro_batch"]
    for name, by_way in CEILINGS.items():
        for how, ceiling in by_way.items():
            assert ceiling / 2 < found[name][how]["all"] / 1e9 <= ceiling
