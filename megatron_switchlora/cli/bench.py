"""The command `switchlora bench`: the benchmarks of the package."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_switchlora.cli.table import run

BENCHMARKS = {
    "step": ("megatron_switchlora.study.benchmarks.step", "Time a training step of each method."),
    "peers": ("megatron_switchlora.study.benchmarks.peers", "Time a step against those of other libraries."),
    "profile": ("megatron_switchlora.study.benchmarks.profile", "Show where the time of a step goes, by part."),
    "moved": ("megatron_switchlora.study.benchmarks.moved", "Count the bytes that elementwise kernels move."),
    "switching": ("megatron_switchlora.study.benchmarks.switching", "Time what switching adds to a step."),
    "parts": ("megatron_switchlora.study.benchmarks.parts", "Time norm, rotary embedding, activation and loss."),
    "checkpoint": ("megatron_switchlora.study.benchmarks.checkpoint", "Time a checkpoint and how it delays training."),
    "export": ("megatron_switchlora.study.benchmarks.export", "Time the export of a large model and its memory."),
    "coverage": ("megatron_switchlora.study.coverage", "Measure what LoRA-GA's first step covers of the gradient."),
}


def main(argv: Sequence[str]) -> None:
    """Run one of them."""
    run("switchlora bench", BENCHMARKS, argv)
