"""Predicted traffic: the published reductions, what a ring sends, and the tool's command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Optional

import pytest

from megatron_switchlora.config.command_line import parse_arguments
from megatron_switchlora.config.ds_config import Zero
from megatron_switchlora.config.run import RunConfig
from megatron_switchlora.methods.base import Flow
from megatron_switchlora.planning.traffic import flows, on_the_wire
from megatron_switchlora.study.volume.command import main

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "launch" / "configs"
VOCAB = 32100


def large(method: str, *more: str) -> RunConfig:
    files = [CONFIGS / "llama_1.3b.yaml", CONFIGS / "methods" / f"{method}.yaml"]
    return parse_arguments([*(f"--config={file}" for file in files), *more]).config


def total(found: list[Flow], kind: str, op: Optional[str] = None) -> float:
    return sum(flow.bytes for flow in found if flow.kind == kind and op in (None, flow.op))


def test_what_rings_send() -> None:
    assert on_the_wire("all_reduce", 100, 4) == 150
    assert on_the_wire("all_gather", 100, 4) == 300
    assert on_the_wire("all_reduce", 100, 1) == on_the_wire("all_gather", 100, 1) == 0


@pytest.mark.parametrize(("method", "saved"), [("switchlora_r512", 0.545), ("switchlora_r256", 0.723)])
def test_the_published_reduction(method: str, saved: float) -> None:
    mesh = {"lte": 1, "dp": 128, "tp": 1}
    bare = ("--model.pad_multiple", "1")
    full = total(flows(large("full", *bare), VOCAB, mesh, Zero(1)), "gradients")
    assert full == 2 * 1_339_492_352
    assert 1 - total(flows(large(method, *bare), VOCAB, mesh, Zero(1)), "gradients") / full == pytest.approx(
        saved, abs=5e-4
    )


def test_parameters_and_micro_batches() -> None:
    """ZeRO 1 gathers what it has reduced, ZeRO 2 reduces at every micro-batch, ZeRO 0 gathers nothing."""
    config, mesh = large("switchlora_r512", "--train.global_batch_size", "6144"), {"lte": 1, "dp": 128, "tp": 1}
    once = flows(config, VOCAB, mesh, Zero(1))
    assert total(once, "parameters", "all_gather") * 128 == total(once, "gradients", "all_reduce")
    assert total(flows(config, VOCAB, mesh, Zero(2)), "gradients") == 4 * total(once, "gradients")
    assert total(flows(config, VOCAB, mesh, Zero(0)), "parameters") == 0


def test_one_rank_gives_nothing() -> None:
    assert flows(large("switchlora_r512"), VOCAB, {"lte": 1, "dp": 1, "tp": 1}, Zero(1)) == []


def test_heads_give_in_merges_only() -> None:
    """8 heads of rank 64: the smaller of factors and delta, layer by layer, and the dense tensors in fp32."""
    config = large("lte_r64", "--parallel.lte_heads", "8")
    found = flows(config, VOCAB, {"lte": 8, "dp": 1, "tp": 1}, Zero(0))
    assert {flow.kind for flow in found} == {"merges"} and {flow.axis for flow in found} == {"lte"}
    h, f, v, r = 2048, 5504, 32128, 64  # padded
    shapes = [(h, h)] * 4 + [(f, h)] * 3
    factors = sum(2 * r * (m + n) for m, n in shapes)
    products = 0
    assert total(found, "merges", "all_gather") * 10 == 24 * factors
    assert total(found, "merges", "all_reduce") * 10 == 24 * products + 4 * (2 * v * h + 49 * h)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("heads", [8, 32, 40, 64, 80, 128])
def test_a_merge_moves_the_smaller_of_factors_and_products(heads: int, precision: str) -> None:
    """In bytes received: (H - 1) times what is gathered, 2 (H - 1) / H times what is reduced. Factors travel in the
    precision of compute, products in fp32; with as many heads as pass one for 1.3B they pass the other."""

    def received(how: str) -> float:
        given = ("--parallel.lte_heads", str(heads), "--train.precision", precision, "--method.lte.merge_traffic", how,
                 "--train.global_batch_size", str(12 * heads), "--train.micro_batch_size", "12")  # fmt: skip
        found = flows(large("lte_r64", *given), VOCAB, {"lte": heads, "dp": 1, "tp": 1}, Zero(0))
        gathered, reduced = total(found, "merges", "all_gather"), total(found, "merges", "all_reduce")
        return gathered * (heads - 1) + reduced * 2 * (heads - 1) / heads

    auto, factors, products = map(received, ("auto", "factors", "delta"))
    assert auto <= min(factors, products) * (1 + 1e-12)
    square = {"fp32": 32, "bf16": 64}[precision]  # to so many heads factors are less for [h, h], above for no layer but
    wide = {"fp32": 46, "bf16": 93}[precision]  # [f, h], and above so many for none
    assert (auto == factors, auto == products) == (heads <= square, heads > wide)


def run_tool(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/gradient_volume.py", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_the_command_writes_table_and_chart(tmp_path: Path) -> None:
    names = ["full", "switchlora_r512"]
    methods = [f"--method=launch/configs/methods/{name}.yaml" for name in names]
    done = run_tool("--world", "128", "--config", "launch/configs/llama_1.3b.yaml", *methods, "--out",
                    str(tmp_path / "volume.json"))  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "-54.6%" in done.stdout
    assert (tmp_path / "volume.md").read_text() == done.stdout
    assert (tmp_path / "volume.png").stat().st_size > 5_000
    assert [result["name"] for result in json.loads((tmp_path / "volume.json").read_text())] == names


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--world", "0"], "--world must be at least 1, not 0"),
        (["--world", "6", "--parallel.tp", "4"], "The world of 6 ranks must be a multiple"),
        (["--world", "4", "--steps", "3"], "--steps goes with --measure"),
        (["--world", "4", "--out", "missing/volume.json"], "--out missing/volume.json must be a .json in a folder"),
        (["--world", "4", "--method", "full.yaml 'x"], '--method "full.yaml \'x": No closing quotation'),
        (["--world", "4", "--method=--method.rank 8"], "--method '--method.rank 8': a YAML must come first"),
        (["--world", "4", "--accumulation", "0"], "--accumulation must be at least 1, not 0"),
        (["--world", "4", "--method", "missing.yaml"], "--config missing.yaml cannot be read"),
        (["--world", "4", "--ds_config", "missing.json"], "--ds_config missing.json cannot be read"),
    ],
)
def test_mistakes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("megatron_switchlora.startup.door.end_rank", sys.exit)
    with pytest.raises(SystemExit) as end:
        main(["--config", "launch/configs/llama_1.3b.yaml", *words])
    assert end.value.code == 2
    assert f"error: {message}" in capsys.readouterr().err
