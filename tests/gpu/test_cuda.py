"""On a GPU: the same steps as on the CPU, and the bank in pinned host memory."""

from __future__ import annotations

import pytest
import torch

from megatron_switchlora.config.ds_config import Zero
from megatron_switchlora.config.method import LoraGaConfig
from megatron_switchlora.config.model import ModelConfig
from megatron_switchlora.distributed.mesh import lone_mesh
from megatron_switchlora.methods.ga_gradients import find_factors
from megatron_switchlora.model.llama.model import LlamaForCausalLM
from megatron_switchlora.model.protocol import initialize_weights
from megatron_switchlora.planning.memory import memory_items, peak_bytes
from tests.plain import VOCAB, PlainRun, make_batches, make_samples, small_config

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def moved_run(**changes: object) -> PlainRun:
    return PlainRun(small_config(**changes), torch.float64, device="cuda")


def test_steps_equal_the_cpu() -> None:
    config = small_config()
    cpu, gpu = PlainRun(config, torch.float64), moved_run()
    for step, batch in enumerate(make_batches(config, 20)):
        mine, theirs = gpu.step(step, batch.cuda()), cpu.step(step, batch)
        assert mine[2] == theirs[2]
        assert mine[0] == pytest.approx(theirs[0], rel=1e-9)


def test_host_bank_is_pinned_and_changes_nothing() -> None:
    host, device = moved_run(method__switch__bank_device="host"), moved_run()
    assert all(rows.is_pinned() for _, rows in host.method.bank.tensors())
    for step, batch in enumerate(make_batches(host.config, 10)):
        assert host.step(step, batch.cuda()) == device.step(step, batch.cuda())


@pytest.mark.parametrize("name", ["full", "lora", "switchlora"])
def test_the_peak_of_a_step_is_as_planned(name: str) -> None:
    """Of a model whose tensors are large beside cuBLAS's workspace."""
    changes = {"train__seq_len": 256, "train__micro_batch_size": 8, "train__global_batch_size": 8, "method__rank": 64}
    config = small_config(name, **changes, method__switch__interval0=1e9)
    config.model = ModelConfig(hidden_size=768, intermediate_size=2048, num_layers=8, num_heads=12)
    run = PlainRun(config, device="cuda")
    batches = [batch.cuda() for batch in make_batches(config, 2)]
    run.step(0, batches[0])
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    run.step(1, batches[1])
    torch.cuda.synchronize()
    predicted = peak_bytes(memory_items(config, VOCAB, 1, 1, Zero(0)))
    print(f"{name}: {predicted / torch.cuda.max_memory_allocated() - 1:+.1%}")
    assert predicted == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.1)


def test_lora_ga_begins_as_on_the_cpu() -> None:
    ga = LoraGaConfig(samples=16, scale="weight")
    config = small_config("lora", method__init="lora_ga", method__rslora=True, method__ga=ga)
    model = LlamaForCausalLM(config.model, VOCAB)
    initialize_weights(model, config.train.seed)
    devices = (torch.device("cpu"), torch.device("cuda"))
    cpu, gpu = (find_factors(config, model.double(), lone_mesh(), make_samples(config), device) for device in devices)
    assert cpu is not None and gpu is not None
    for name, factors in cpu.items():
        for mine, goal in zip(gpu[name], factors, strict=True):
            assert torch.allclose(mine, goal, atol=1e-8), name
