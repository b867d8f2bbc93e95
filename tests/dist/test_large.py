"""The shipped 1.3B configurations: whole models on the meta device at several degrees, one layer of them for real."""

from __future__ import annotations

import pytest
import torch

from megatron_switchlora.config.command_line import parse_arguments
from megatron_switchlora.distributed.mesh import Mesh
from megatron_switchlora.distributed.shard import Axis
from megatron_switchlora.methods import build_method
from megatron_switchlora.model.llama.model import LlamaForCausalLM
from megatron_switchlora.planning.counts import count_run
from tests.dist.launch import REPOSITORY, run_ranks

CONFIGS = REPOSITORY / "launch" / "configs"


@pytest.mark.parametrize("tp", [1, 2, 8])
@pytest.mark.parametrize("rank", [0, -1])
def test_the_whole_model_has_the_parameters_that_are_counted(tp: int, rank: int) -> None:
    files = ("llama_1.3b", "methods/full")
    config = parse_arguments([f"--config={CONFIGS}/{name}.yaml" for name in files]).config
    with torch.device("meta"):
        model = LlamaForCausalLM(config.model, 32100, Axis(tp, rank % tp, None))
    counts = count_run(config, 32100, tp)
    found = sum(param.numel() for param in model.parameters())
    assert found == counts.trainable
    if tp == 1:
        assert count_run(config, 32100).trainable == 1_339_492_352 < found


@pytest.mark.parametrize("tp", [1, 2, 8])
@pytest.mark.parametrize("method", ["switchlora_r512", "switchlora_r256", "lte_r64", "lora_r512"])
def test_the_adapted_model_has_the_parameters_that_are_counted(tp: int, method: str) -> None:
    """Adapters, frozen W and bank of a whole model, as the method makes them, without memory."""
    files = ("llama_1.3b", f"methods/{method}")
    options = [f"--config={CONFIGS}/{name}.yaml" for name in files] + [f"--parallel.tp={tp}"]
    config = parse_arguments(options).config
    mesh = Mesh({"lte": 1, "dp": 1, "tp": tp}, {"lte": 0, "dp": 0, "tp": tp - 1}, {})
    with torch.device("meta"):
        model = LlamaForCausalLM(config.model, 32100, mesh.axis("tp"))
        method_ = build_method(config, model, mesh)
    counts = count_run(config, 32100, tp)
    assert sum(param.numel() for param in model.parameters()) == counts.trainable
    assert sum(buffer.numel() for buffer in model.buffers()) == counts.fixed.total()
    if tp == 1 and method.startswith("switchlora"):
        assert (
            count_run(config, 32100).trainable
            == {"switchlora_r512": 609_720_320, "switchlora_r256": 370_651_136}[method]
        )
    assert len(method_.matrices()) == 2 * 7 * 24


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("method", "tp", "precision"),
    [
        pytest.param("switchlora_r256", 2, "fp32", marks=pytest.mark.full),
        pytest.param("lte_r64", 1, "fp32", marks=pytest.mark.full),
        pytest.param("switchlora_r256", 2, "bf16", marks=pytest.mark.long),
        pytest.param("full", 1, "fp32", marks=pytest.mark.long),
        pytest.param("switchlora_r512", 1, "fp32", marks=pytest.mark.long),
    ],
)
def test_one_layer_trains(method: str, tp: int, precision: str) -> None:
    """In bf16, as its file sets it, one of them is long: many CPUs are slow in it. Its shape is trained in fp32, and
    bf16 in every class of DeepSpeed's by tests/dist/test_tp_parity.py."""
    options = ["--model.num_layers=1", "--train.global_batch_size=1", "--train.micro_batch_size=1",
               "--train.seq_len=64", f"--parallel.tp={tp}", "--method.switch.interval0=10", "--train.device=cpu",
               f"--train.precision={precision}"]  # fmt: skip
    payload = {"tp": tp, "files": ["llama_1.3b", f"methods/{method}"], "options": options}
    ranks = run_ranks(tp, "tests.dist.large_worker", payload, timeout=300)
    for found in ranks:
        assert found["healthy"] and found["losses"] == ranks[0]["losses"]
        assert 10 < found["losses"][0] < 11 and found["losses"][1] < found["losses"][0]  # ln 32100 = 10.38
        assert (found["switched"] > 0) == method.startswith("switchlora")
