"""A method's life on the pretend GPU beside the same on the CPU, in a process of its own.

Both train, are evaluated, exported and written out as a checkpoint's slices. A second run on the GPU is filled from
those slices and trains the last step again.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_switchlora.checkpoint.engine_state import fill_slices, state_slices
from megatron_switchlora.config.method import LoraGaConfig
from megatron_switchlora.distributed.replica_check import fingerprint
from megatron_switchlora.distributed.slices import TensorSlice
from megatron_switchlora.hf.folders import export_model
from tests.plain import PlainRun, make_batches, small_config
from tests.pretend.gpu import PretendGpu, register

STEPS = 3


def act(payload: dict[str, Any]) -> dict[str, Any]:
    """Run both; return losses, values of the evaluated models, and by how much tensors differ."""
    register()  # before the first backward pass, at which autograd counts the devices
    config, dtype = make_config(payload["changes"]), getattr(torch, payload.get("dtype", "float32"))
    batches = make_batches(config, STEPS)
    cpu = PlainRun(config, dtype)
    wanted = [cpu.step(step, batch) for step, batch in enumerate(batches)]
    with PretendGpu() as gpu:
        run = PlainRun(config, dtype, device=str(gpu.device))
        assert_on(gpu.device, run)
        run.model.checkpointing = config.train.activation_checkpointing
        found = [run.step(step, batch.to(gpu.device)) for step, batch in enumerate(batches[:-1])]
        stored = {place(held): held.tensor.to("cpu", copy=True) for held in state_slices(engine(run))}
        found.append(run.step(STEPS - 1, batches[-1].to(gpu.device)))
        prints = [fingerprint(each.tensor).tolist() for each in run.method.replicas()]
        resumed = resumed_run(run, stored, dtype, gpu.device)
        again = resumed.step(STEPS - 1, batches[-1].to(gpu.device))
        later = [fingerprint(each.tensor).tolist() for each in resumed.method.replicas()]
        measured, exported = outcome(run, batches[0], gpu.device)
    expected, files = outcome(cpu, batches[0], torch.device("cpu"))
    return {
        "losses": [found, wanted],
        "again": again,
        "fingerprints_equal": prints == later,
        "tensors": len(prints),
        "evaluated": [measured, expected],
        "exported": max(float((exported[name].float() - files[name].float()).abs().max()) for name in files),
    }


def make_config(changes: dict[str, Any]) -> Any:
    changes = dict(changes)
    config = small_config(changes.pop("name"), **{"model__num_layers": 1, "train__global_batch_size": 4, **changes})
    if config.method.init == "lora_ga":
        config.method.ga = LoraGaConfig(samples=16)
    return config


def assert_on(device: torch.device, run: PlainRun) -> None:
    moments = [state["exp_avg"] for state in run.optimizer.state.values()]
    assert {tensor.device for tensor in [*run.model.parameters(), *run.model.buffers(), *moments]} == {device}


def engine(run: PlainRun) -> Any:
    """What checkpoints take for an engine."""
    return SimpleNamespace(**vars(run), ds=SimpleNamespace())


def place(held: TensorSlice) -> tuple[str, tuple[int, ...]]:
    return held.name, held.offset


def resumed_run(run: PlainRun, stored: dict[Any, Tensor], dtype: torch.dtype, device: torch.device) -> PlainRun:
    """Another run, filled from the slices."""
    resumed = PlainRun(run.config, dtype, device=str(device), seed=run.config.train.seed + 1)

    def fill(held: TensorSlice) -> None:
        held.tensor.copy_(stored[place(held)].view(held.tensor.shape))

    fill_slices(engine(resumed), fill, STEPS - 1)
    resumed.method.loaded()
    resumed.model.checkpointing = run.model.checkpointing
    return resumed


@torch.no_grad()
def outcome(run: PlainRun, batch: Tensor, device: torch.device) -> tuple[float, dict[str, Tensor]]:
    """The evaluated model's loss on a batch, and the tensors of an exported folder."""
    tokens = batch.to(device)
    loss = float(run.method.evaluated()(tokens[:, :-1], tokens[:, 1:]))
    with tempfile.TemporaryDirectory() as name:
        export_model(run.method.evaluated(exported=True), Path(name), run.config.train.seq_len, {})
        return loss, load_file(Path(name) / "model.safetensors")
