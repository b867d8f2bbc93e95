"""Choose where this rank computes, before deepspeed is imported.

DeepSpeed picks its accelerator at import. With fewer GPUs than local ranks it must be set to the CPU. `BF16_PEAK` holds
the dense bf16 FLOP/s of the vendor's data sheets, for MFU; runs in fp32 have none.
"""

from __future__ import annotations

import contextlib
import os
import resource
import sys
from typing import Optional

import torch

from megatron_switchlora.config.errors import require
from megatron_switchlora.startup.environment import Ranks, cpu_threads

BF16_PEAK = {
    "A100": 312e12, "A6000": 155e12, "B200": 2250e12, "GB200": 2500e12, "GH200": 989e12, "H100": 989e12,
    "H100 NVL": 835e12, "H100 PCIe": 756e12, "H200": 989e12, "H200 NVL": 835e12, "L40S": 362e12, "RTX 4090": 165e12,
}  # fmt: skip

REPEATABLE = (":4096:8", ":16:8")  # cuBLAS's workspaces whose results do not depend on streams
OPEN_FILES = 64  # one rank alone has 40 open


def choose_device(requested: str, ranks: Ranks, threads: int) -> torch.device:
    """Set threads, the accelerator and the current device; call it before importing deepspeed.

    Raises:
        UserError: the host has fewer GPUs than ranks. Not raised where the CPU is requested, or for "auto" without
            GPUs.
    """
    torch.set_num_threads(cpu_threads(threads, ranks.local_size, os.environ)[0])
    gpus = torch.cuda.device_count()
    if requested == "cuda" or (requested == "auto" and gpus):
        require(
            gpus >= ranks.local_size,
            f"train.device {requested} needs a GPU for each of the {ranks.local_size} ranks of a host, but a rank sees "
            f"{gpus}: start fewer ranks, let each see all of the host's GPUs (under Slurm --gpus-per-node, not "
            "--gpus-per-task), or set train.device cpu.",
        )
    if requested == "cpu" or not gpus:
        check_deepspeed("cpu")
        os.environ["DS_ACCELERATOR"] = "cpu"
        return torch.device("cpu")
    check_deepspeed("cuda")
    os.environ["DS_ACCELERATOR"] = "cuda"  # by itself it looks for other accelerators first
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the older name
        # DeepSpeed's buckets come and go beside activations of other sizes; without this they leave gaps.
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    torch.cuda.set_device(ranks.local_rank)
    # Some images set TF32 in the environment; a fold would keep 10 bits of 23.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    # Where a product is split along its sum, parts rounded to bf16 would be added.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    return torch.device("cuda", ranks.local_rank)


def is_gpu(device: torch.device) -> bool:
    """Return whether tensors on the device are in other memory than the host's."""
    return device.type not in ("cpu", "meta")


def pinned(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a host tensor, for a GPU in pinned memory: the host need not wait for copies from there."""
    return tensor.pin_memory() if is_gpu(device) else tensor


def set_determinism(wanted: bool) -> None:
    """Choose whether a GPU computes the same bits each time; call it before the first product on a GPU.

    Raises:
        UserError: the environment asks cuBLAS for another kind of workspace.
    """
    if wanted:
        given = os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", REPEATABLE[0])
        require(
            given in REPEATABLE,
            f"train.deterministic true needs CUBLAS_WORKSPACE_CONFIG to be one of {', '.join(REPEATABLE)}, but the "
            f"environment sets it to {given}: unset it.",
        )
    torch.use_deterministic_algorithms(wanted)
    # Else torch would fill every empty tensor, such as DeepSpeed's buckets, at every use.
    torch.utils.deterministic.fill_uninitialized_memory = not wanted  # type: ignore[attr-defined]


def gpu_identity(device: torch.device) -> dict[str, str]:
    """Return what all ranks must share of their GPUs, or results computed on each would differ in bits."""
    if device.type != "cuda":
        return {}
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    name = torch.cuda.get_device_name(device)
    units = torch.cuda.get_device_properties(device).multi_processor_count
    return {
        "GPU": name,
        "multiprocessors of the GPU": str(units),
        "version of CUDA": str(torch.version.cuda),
        "version of NCCL": nccl,
    }


def release_cached(device: torch.device) -> None:
    """Return to the GPU what its allocator keeps of freed tensors, as blocks that suit other sizes ill."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def allow_open_files() -> None:
    """Raise this process's limit of open files to the maximum, since every group of ranks opens sockets.

    Raises:
        UserError: the limit is too low for one rank alone.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY or hard > soft:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    require(
        allowed == resource.RLIM_INFINITY or allowed >= OPEN_FILES,
        f"A process may open {allowed} files here, a rank needs at least {OPEN_FILES}: raise it (ulimit -n 1024).",
    )


def check_deepspeed(kind: str) -> None:
    """Assert that deepspeed is not imported yet, or was imported for this accelerator."""
    imported_for = os.environ.get("DS_ACCELERATOR")
    assert "deepspeed" not in sys.modules or imported_for == kind, (
        f"deepspeed was imported for {imported_for}, the device is {kind}"
    )


def precision_warning(device: torch.device, precision: str) -> Optional[str]:
    """Return a warning for a CPU that computes in bf16 without instructions for it, else None."""
    capability = torch.backends.cpu.get_cpu_capability()
    if device.type != "cpu" or precision != "bf16" or capability not in ("AVX2", "DEFAULT", "NO AVX"):
        return None
    return (
        f"train.precision bf16 on a CPU without AVX-512 (PyTorch finds {capability}): products of matrices take 10 "
        "times as long as in fp32, or far longer. Set train.precision fp32, or train elsewhere."
    )


def peak_flops(device: torch.device, precision: str) -> Optional[float]:
    """Return the dense FLOP/s of the device at a precision, where known."""
    if device.type != "cuda" or precision != "bf16":
        return None
    name = torch.cuda.get_device_name(device)
    known = [key for key in BF16_PEAK if key in name]
    return BF16_PEAK[max(known, key=len)] if known else None


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak of memory so far, in bytes: allocated on the GPU, resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
