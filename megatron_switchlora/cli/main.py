"""The command `switchlora`; its subcommands are those of launch/pretrain.py and tools/*.py."""

from __future__ import annotations

import sys

from megatron_switchlora.cli.table import run

COMMANDS = {
    "pretrain": ("megatron_switchlora.train.pretrain", "Pre-train a model, as one process."),
    "plan": ("megatron_switchlora.planning.command", "Plan mesh, memory and step time on a cluster."),
    "compare": ("megatron_switchlora.study.comparison.command", "Compare training methods at swept rates."),
    "analyze": ("megatron_switchlora.study.analysis.command", "Analyse how the weights of a run have moved."),
    "volume": ("megatron_switchlora.study.volume.command", "Predict or measure gradient volume."),
    "convert": ("megatron_switchlora.hf.convert", "Convert from and to Hugging Face."),
    "generate": ("megatron_switchlora.hf.generate", "Continue a prompt with a trained model."),
    "bench": ("megatron_switchlora.cli.bench", "Measure step, switching, checkpoint, export or LoRA-GA's start."),
    "check-gpu": ("megatron_switchlora.study.gpu_check", "Check this machine's GPU: correctness first, then speed."),
    "init-scripts": ("megatron_switchlora.cli.init_scripts", "Write launch scripts and configurations to a folder."),
}


def main() -> None:
    """Run `switchlora` with the words of this process."""
    run("switchlora", COMMANDS, sys.argv[1:])
