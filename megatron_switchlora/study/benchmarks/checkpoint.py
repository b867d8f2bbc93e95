"""Measure how long a checkpoint keeps training waiting: written in the background against written at once.

One process trains a SwitchLoRA model and saves it in turn in either way. The stall is the time that training stands
still. While the background writes, training continues; the time of these steps over that of undisturbed ones is given
too. All are medians.

    switchlora bench checkpoint --folder /some/disk --out benchmarks/checkpoint_cpu.json
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from megatron_switchlora.config.command_line import parse_arguments
from megatron_switchlora.config.field_checks import number_from
from megatron_switchlora.config.run import RunConfig
from megatron_switchlora.disk import user_path
from megatron_switchlora.startup.door import the_door
from megatron_switchlora.startup.environment import end_rank
from megatron_switchlora.study.benchmarks.common import describe_machine, join_ranks, make_engine, publish

VOCABULARY = 8192
MODEL = {"hidden_size": 512, "intermediate_size": 1376, "num_layers": 8, "num_heads": 8}


def configuration() -> RunConfig:
    options = [word for key, value in MODEL.items() for word in (f"--model.{key}", str(value))]
    options += ["--method.rank", "128", "--train.seq_len", "64", "--train.micro_batch_size", "2"]
    return parse_arguments([*options, "--train.global_batch_size", "2", "--train.device", "cpu"]).config


def batches() -> Iterator[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    while True:
        yield [torch.randint(0, VOCABULARY, (2, 65), generator=generator)]


def measure(rounds: int, folder: Path) -> dict[str, Any]:
    _, device = join_ranks("cpu")
    from megatron_switchlora.checkpoint.saver import Saver

    config = configuration()
    engine = make_engine(config, VOCABULARY, device)
    tokens, step = batches(), 0

    def train() -> float:
        nonlocal step
        began = time.perf_counter()
        engine.train_step(step, next(tokens))
        step += 1
        return time.perf_counter() - began

    for _ in range(3):
        train()
    stalls: dict[str, list[float]] = {"at_once": [], "background": []}
    quiet, disturbed, writing = [], [], []
    savers = {
        name: Saver(
            folder / name, engine, replace(config.checkpoint, keep_last=1, background=name == "background"), print
        )
        for name in stalls
    }
    for turn in range(rounds + 1):  # the first round allocates the host buffers and is not counted
        for name, saver in savers.items():
            began = time.perf_counter()
            saver.save(step, {"state.json": b"{}"})
            if name == "at_once":
                saver.finish()
            stall = time.perf_counter() - began
            while name == "background" and not saver.written:
                seconds = train()
                disturbed += [seconds] * (turn > 0)
            saver.finish()
            if turn:
                stalls[name].append(stall)
                writing.append(saver.history[-1]["seconds"])
            quiet += [train() for _ in range(3)]
    return {
        "rounds": rounds,
        "checkpoint_bytes": int(savers["background"].history[-1]["bytes"]),
        "bytes_by_formula": savers["background"].expected,
        "stall_seconds": {name: median(values) for name, values in stalls.items()},
        "stall_background_over_at_once": median(
            b / a for a, b in zip(stalls["at_once"], stalls["background"], strict=True)
        ),
        "seconds_until_written": median(writing),
        "step_while_writing_over_quiet_step": median(disturbed) / median(quiet),
        "machine": describe_machine(),
    }


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=number_from(1), default=7)
    parser.add_argument("--folder", type=user_path, help="disk to write on (default: that of temporary files)")
    parser.add_argument("--out", type=user_path, default=None, help="also write the JSON here")
    arguments = parser.parse_args(argv)
    with the_door():
        folder = Path(tempfile.mkdtemp(dir=arguments.folder))
        try:
            publish(measure(arguments.rounds, folder), arguments.out)
        finally:
            shutil.rmtree(folder)
        end_rank(0)
