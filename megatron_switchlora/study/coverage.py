"""Measure how much of the gradient rank r covers, by kind of layer (LoRA-GA, fig. 5).

The cover is the share of the gradient's squared singular values. The options are those of a run. One process computes
every adapted matrix's gradient as LoRA-GA does at its start: at the initial weights or those of --train.init_from, over
method.ga.samples samples. Curves are means over the layers; LoRA-GA's first step keeps what rank 2r covers. Writes
OUT.json and OUT.png.

    switchlora bench coverage --out coverage --config cpu_quickstart
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_switchlora.checkpoint.files import verified
from megatron_switchlora.checkpoint.weights import Weights, find_folder, load_initial
from megatron_switchlora.config.command_line import parse_arguments
from megatron_switchlora.config.errors import UserError, ends_on_mistake, require
from megatron_switchlora.config.run import RunConfig
from megatron_switchlora.data.packing import prepare
from megatron_switchlora.disk import replace_text, user_path
from megatron_switchlora.distributed.mesh import lone_mesh
from megatron_switchlora.methods.ga_gradients import mean_gradients
from megatron_switchlora.model.protocol import build_model, initialize_weights
from megatron_switchlora.run.figures import decorating, new_figure, save_figure
from megatron_switchlora.startup.device import choose_device
from megatron_switchlora.startup.door import settle
from megatron_switchlora.startup.environment import discover_ranks
from megatron_switchlora.train.dataset import vocabulary_size


def covered(gradient: Tensor) -> Tensor:
    """Return the share of the squared singular values that the first 1, 2, ... cover, float64 [min(m, n)]."""
    squares = torch.linalg.svdvals(gradient).double().square()
    return squares.cumsum(0) / squares.sum()


def measure(config: RunConfig, device: torch.device) -> dict[str, Any]:
    """Return the mean curve of each kind of layer, and what the run's rank and twice of it cover."""
    require(config.parallel.tp == 1, f"This tool is one process, and parallel.tp is {config.parallel.tp}: set it to 1.")
    data = prepare(config.data)
    for note in data.notes:
        print(f"warning: {note}", file=sys.stderr)
    model = build_model(config.model, vocabulary_size(config, data))
    initialize_weights(model, config.train.seed)
    if config.train.init_from:
        load_initial(model, Weights(verified(find_folder(Path(config.train.init_from)))))
    samples = data.train.samples(config.train.seq_len)
    gradients: dict[str, list[Tensor]] = {}
    for name, gradient in mean_gradients(config, model, lone_mesh(), samples, device).items():
        gradients.setdefault(name.split(".")[-1], []).append(covered(gradient.to(device)).cpu())
    rank, kinds = config.method.rank, {}
    for kind, layers in gradients.items():
        mean = torch.stack(layers).mean(0)
        at = {f"rank_{r}": round(float(mean[min(r, len(mean)) - 1]), 6) for r in (rank, 2 * rank)}
        kinds[kind] = {**at, "layers": len(layers), "covered": [round(x, 6) for x in mean.tolist()]}
    return {"samples": config.method.ga.samples, "seq_len": config.train.seq_len, "rank": rank, "kinds": kinds}


def plot(curves: dict[str, Any], path: Path) -> None:
    """Draw the covered share against rank, a line for each kind of layer."""
    figure = new_figure(7, 4.5)
    axes = figure.add_subplot()
    for kind, entry in curves["kinds"].items():
        axes.plot(range(1, len(entry["covered"]) + 1), entry["covered"], label=kind, linewidth=1)
    for times in (1, 2):
        axes.axvline(times * curves["rank"], color="grey", linestyle=":", linewidth=1)
    axes.set(xlabel="rank", ylabel="share of squared singular values", xscale="log", ylim=(0, 1.02))
    axes.set_title(f"gradient of {curves['samples']} samples, mean over layers; dotted: r and 2r", fontsize=10)
    axes.grid(alpha=0.3)
    save_figure(figure, path)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=user_path, required=True, help="writes OUT.json and OUT.png")
    arguments, options = parser.parse_known_args(argv)
    with ends_on_mistake():
        settle(first=True)
        config = parse_arguments(options).config
        curves = measure(config, choose_device(config.train.device, discover_ranks(os.environ), config.train.threads))
        try:
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            replace_text(Path(f"{arguments.out}.json"), json.dumps(curves) + "\n")
        except OSError as error:
            raise UserError(f"{arguments.out}.json cannot be written ({error}): give another --out.") from None
    with decorating(f"drawing {arguments.out}.png"):
        plot(curves, Path(f"{arguments.out}.png"))
    for kind, entry in curves["kinds"].items():
        shares = ", ".join(f"rank {r}: {entry[f'rank_{r}']:.1%}" for r in (curves["rank"], 2 * curves["rank"]))
        print(f"{kind:<10} {shares} of {entry['layers']} layers' squared singular values")
