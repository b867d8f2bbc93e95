"""`switchlora bench parts`: what it reports, not how long it takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_switchlora.study.benchmarks import parts


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """Run the command in this process, and return its status."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # it may have been imported here for the CPU
    statuses: list[int] = []
    monkeypatch.setattr(parts, "end_rank", statuses.append)
    parts.main([*words, "--hidden_size", "64", "--vocab_size", "40", "--rounds", "1", "--threads", "1"])
    return statuses[0]


def test_ratios_and_bytes_of_every_part(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = tmp_path / "parts.json"
    assert run(monkeypatch, "--tokens", "512", "--intermediate_size", "72", "--out", str(out)) == 0
    found = json.loads(out.read_text())
    for precision, size in (("fp32", 4), ("bf16", 2)):
        of = found[precision]
        assert {name: set(forms) for name, forms in of.items()} == {
            "norm": {"plain", "torch", "ours"}, "rotary": {"plain", "ours"},
            "swiglu": {"plain", "ours"}, "loss": {"plain", "ours"},
        }  # fmt: skip
        for name in ("norm", "rotary", "swiglu"):
            assert of[name]["ours"]["held_bytes"] < of[name]["plain"]["held_bytes"]
            assert of[name]["plain"]["time_ratio"] == 1.0 and of[name]["ours"]["seconds"] > 0
        assert of["norm"]["ours"]["held_bytes"] == size * 512 * 64 + size * 64 + 4 * 512
        assert of["swiglu"]["ours"]["held_bytes"] == size * 2 * 512 * 72
    assert found["machine"]["threads"] == 1
    words = ("--tokens", "512", "--intermediate_size", "72", "--precisions", "fp32", "--out", str(out))
    assert run(monkeypatch, *words) == 0 and json.loads(out.read_text()).keys() & {"fp32", "bf16"} == {"fp32"}
