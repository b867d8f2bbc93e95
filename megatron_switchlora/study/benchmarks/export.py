"""Measure the memory that an export takes: a synthetic checkpoint, converted in a process of its own.

The checkpoint of a configuration has everything that a run of one rank would leave, in a file per layer: random weights
and factors, and moments and bank of zeros, which an export verifies and does not read. The peak is the converter's
largest resident set, as the kernel counts it.

    switchlora bench export launch/configs/llama_1.3b.yaml --rank 512 --out benchmarks/export_1.3b.json
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_switchlora.checkpoint.archive import write_slices
from megatron_switchlora.checkpoint.files import seal
from megatron_switchlora.config.command_line import parse_arguments
from megatron_switchlora.config.field_checks import number_from
from megatron_switchlora.config.run import RunConfig
from megatron_switchlora.disk import user_path
from megatron_switchlora.distributed.slices import TensorSlice
from megatron_switchlora.model.protocol import build_on_meta
from megatron_switchlora.planning.counts import count_run
from megatron_switchlora.study.benchmarks.common import describe_machine, publish

CONVERT = "import sys; from megatron_switchlora.hf.convert import main; main(sys.argv[1:])"


def slice_of(name: str, tensor: torch.Tensor) -> TensorSlice:
    return TensorSlice(name, tuple(tensor.shape), (0,) * tensor.dim(), tensor, None)


def state_of(name: str, shape: tuple[int, ...], rows: int) -> Iterator[TensorSlice]:
    yield slice_of(name, torch.randn(shape) * 0.02)
    yield from (slice_of(f"{name}:{moment}", torch.zeros(shape)) for moment in ("exp_avg", "exp_avg_sq"))
    yield slice_of(f"{name}:row_step", torch.zeros(rows))


def write_checkpoint(folder: Path, config: RunConfig, vocab_size: int) -> None:
    """Write one file for each adapted matrix, one for all dense tensors."""
    model = build_on_meta(config.model, vocab_size)
    linears = {name: linear.weight.shape for name, _, _, linear in model.decoder_linears()}
    r = config.method.rank
    dense = [(n, tuple(p.shape)) for n, p in model.named_parameters() if n.removesuffix(".weight") not in linears]
    write_slices(folder / "tensors-00000.safetensors", [p for n, shape in dense for p in state_of(n, shape, 1)])
    for number, (name, (out, into)) in enumerate(linears.items(), 1):
        slices = [slice_of(f"{name}.weight", torch.randn(out, into) * 0.02)]
        for side, length in (("A", into), ("B", out)):
            slices += state_of(f"{name}.lora_{side}", (r, length), r)
            slices.append(slice_of(f"{name}.bank_{side}", torch.zeros(min(out, into), length)))
        write_slices(folder / f"tensors-{number:05d}.safetensors", slices)
    state = {"step": 1, "config": config.to_dict(), "vocab_size": vocab_size}
    (folder / "state.json").write_text(json.dumps(state), encoding="utf-8")
    seal(folder, 1)


def measure(config: RunConfig, vocab_size: int, scratch: Path, dtype: str) -> dict[str, Any]:
    source, target = scratch / "step-00000001", scratch / "out"
    source.mkdir()
    write_checkpoint(source, config, vocab_size)
    began = time.perf_counter()
    command = [
        sys.executable,
        "-c",
        CONVERT,
        "export",
        str(source),
        str(target),
        "--dtype",
        dtype,
    ]
    subprocess.run(command, check=True)
    return {
        "parameters": count_run(config, vocab_size).full_total,
        "rank": config.method.rank,
        "dtype": dtype,
        "checkpoint_bytes": sum(path.stat().st_size for path in source.iterdir()),
        "exported_bytes": sum(path.stat().st_size for path in target.iterdir()),
        "peak_resident_bytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
        "seconds": round(time.perf_counter() - began, 1),
        "machine": describe_machine(),
    }


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=user_path, help="run configuration with a method that has adapters")
    parser.add_argument("--rank", type=number_from(1), default=512)
    parser.add_argument("--vocab_size", type=number_from(1), default=32000)
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--folder", type=user_path, help="disk to write on (default: that of temporary files)")
    parser.add_argument("--out", type=user_path, default=None, help="also write the JSON here")
    arguments = parser.parse_args(argv)
    options = ["--config", str(arguments.config), "--method.name", "switchlora", "--method.rank", str(arguments.rank)]
    config = parse_arguments(options).config
    scratch = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        publish(measure(config, arguments.vocab_size, scratch, arguments.dtype), arguments.out)
    finally:
        shutil.rmtree(scratch)
