"""Where a rank computes, by the GPUs that it sees."""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_switchlora.checkpoint.resume_rules import what_must_agree
from megatron_switchlora.config.errors import UserError
from megatron_switchlora.config.run import run_config_class
from megatron_switchlora.startup.device import (
    choose_device,
    gpu_identity,
    peak_flops,
    precision_warning,
    release_cached,
    set_determinism,
)
from megatron_switchlora.startup.door import Door
from megatron_switchlora.startup.environment import Ranks
from tests.plain import PlainRun, make_batches, small_config


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch) -> Any:
    """choose_device for local rank 1 of some, where so many GPUs are seen."""
    monkeypatch.delitem(sys.modules, "deepspeed", raising=False)
    monkeypatch.setenv("DS_ACCELERATOR", "unset")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "backend:native")
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)

    def run(requested: str, gpus: int, local_ranks: int) -> torch.device:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        ranks = Ranks(rank=1, world_size=local_ranks, local_rank=1, local_size=local_ranks)
        return choose_device(requested, ranks, 1)

    return run


def test_without_gpus_the_cpu(choose: Any) -> None:
    assert choose("auto", 0, 4) == torch.device("cpu")


def test_a_gpu_each(choose: Any) -> None:
    assert choose("auto", 4, 4) == choose("cuda", 8, 4) == torch.device("cuda", 1)


def test_a_gpu_computes_fp32_in_fp32(choose: Any) -> None:
    """Images may set TF32 in the environment; parts of a product are not added in bf16; DeepSpeed is told which
    accelerator."""
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    for backend in backends:
        backend.allow_tf32 = True
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True
    choose("auto", 2, 2)
    assert not any(backend.allow_tf32 for backend in backends)
    assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    assert os.environ["DS_ACCELERATOR"] == "cuda"


def test_the_device_is_current_before_all_else(choose: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    choose("cuda", 4, 4)
    assert calls == [1]


def test_ranks_compare_their_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"chip {device.index}")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 30, 1))
    identity = gpu_identity(torch.device("cuda", 3))
    assert (identity["GPU"], identity["version of NCCL"]) == ("chip 3", "2.30.1")
    assert identity["multiprocessors of the GPU"] == "132"
    assert gpu_identity(torch.device("cpu")) == {}
    same = what_must_agree(run_config_class()(), {}, torch.device("cuda", 3))
    assert same["GPU"] == "chip 3"


def test_a_rank_waits_for_its_gpu_before_it_leaves_the_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("wait"))
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: done.append("leave"))
    Door().close()
    assert done == ["wait", "leave"]


def test_the_allocator_can_grow_its_segments_unless_the_user_chose(
    choose: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    for given, wanted in (
        ({}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        ({"PYTORCH_ALLOC_CONF": "backend:native"}, {"PYTORCH_ALLOC_CONF": "backend:native"}),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}),
    ):
        for name in names:
            monkeypatch.delenv(name, raising=False)
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        choose("cuda", 2, 2)
        assert {name: os.environ[name] for name in names if name in os.environ} == wanted
        monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)


def test_what_the_allocator_keeps_is_returned_on_a_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty"))
    release_cached(torch.device("cpu"))
    assert not calls
    release_cached(torch.device("cuda", 0))
    assert calls == ["empty"]


def test_the_cpu_when_asked_for(choose: Any) -> None:
    assert choose("cpu", 8, 4) == torch.device("cpu")


@pytest.mark.parametrize(("requested", "gpus"), [("auto", 1), ("auto", 3), ("cuda", 3), ("cuda", 0)])
def test_too_few_gpus_are_refused(choose: Any, requested: str, gpus: int) -> None:
    """Also by auto: four ranks that Slurm shows one GPU each would quietly train on the CPU."""
    with pytest.raises(UserError, match=f"train.device {requested} needs a GPU for each of the 4 ranks .* sees {gpus}"):
        choose(requested, gpus, 4)


def test_deepspeed_imported_for_another_accelerator_is_a_bug(choose: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", sys)
    with pytest.raises(AssertionError, match="imported for unset, the device is cpu"):
        choose("cpu", 0, 2)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert choose("cpu", 0, 2) == torch.device("cpu")
    with pytest.raises(AssertionError, match="imported for cpu, the device is cuda"):
        choose("cuda", 2, 2)


@pytest.mark.parametrize(
    ("device", "precision", "capability", "warned"),
    [("cpu", "bf16", "AVX2", True), ("cpu", "bf16", "DEFAULT", True), ("cpu", "bf16", "AVX512", False),
     ("cpu", "fp32", "AVX2", False), ("cuda", "bf16", "AVX2", False)],
)  # fmt: skip
def test_bf16_without_instructions_for_it_is_told(
    monkeypatch: pytest.MonkeyPatch, device: str, precision: str, capability: str, warned: bool
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    told = precision_warning(torch.device(device), precision)
    assert (told is not None and f"finds {capability}" in told) if warned else told is None


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H100 NVL", 835e12),
     ("NVIDIA GH200 480GB", 989e12), ("NVIDIA H200", 989e12), ("NVIDIA B200", 2250e12), ("NVIDIA GB200", 2500e12),
     ("NVIDIA GeForce RTX 4090", 165e12), ("Tesla T4", None)],
)  # fmt: skip
def test_a_peak_is_that_of_the_longest_name(monkeypatch: pytest.MonkeyPatch, name: str, peak: float | None) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda", 0), "bf16") == peak
    assert peak_flops(torch.device("cuda", 0), "fp32") is None


def test_deterministic_is_on_or_off_and_training_has_no_operation_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several runs may share a process. On the CPU the bits are the same."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    config = small_config(train__global_batch_size=2)
    results = []
    try:
        for wanted in (False, True):
            set_determinism(wanted)
            assert torch.are_deterministic_algorithms_enabled() == wanted
            assert torch.utils.deterministic.fill_uninitialized_memory != wanted
            assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == (":4096:8" if wanted else None)
            run = PlainRun(config)
            results.append([run.step(step, batch) for step, batch in enumerate(make_batches(config, 3))])
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
        with pytest.raises(UserError, match=r"needs CUBLAS_WORKSPACE_CONFIG to be one of :4096:8, :16:8, but .* :0:0"):
            set_determinism(True)
    finally:
        set_determinism(False)
    assert results[0] == results[1]
