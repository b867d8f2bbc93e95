"""What commands of the documentation print, without the network or a GPU."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial

from megatron_switchlora.config.command_line import parse_arguments
from megatron_switchlora.planning import command as planning
from megatron_switchlora.shipped import ROOT
from megatron_switchlora.train.pretrain import show_plan

LARGE = (
    f"--config={ROOT}/launch/configs/llama_1.3b.yaml",
    f"--config={ROOT}/launch/configs/methods/switchlora_r512.yaml",
)


def printed(run: Callable[[], None]) -> str:
    """Return what a function prints, as a block of Markdown."""
    text = io.StringIO()
    with redirect_stdout(text):
        run()
    return f"```text\n{text.getvalue().rstrip()}\n```"


def dry_run() -> None:
    """Print the plan of the 1.3B model on eight ranks."""
    show_plan(parse_arguments([*LARGE, "--dry_run", "--dry_run_world=8"]), first=True)


def plan() -> None:
    """Print the fastest mesh of the 1.3B model on 16 nodes of eight H100."""
    planning.main([*LARGE, "--nodes=16", "--gpus=8", "--gpu=h100", "--link=400Gb"])


OUTPUTS: dict[str, Callable[[], str]] = {"dry-run": partial(printed, dry_run), "plan": partial(printed, plan)}
