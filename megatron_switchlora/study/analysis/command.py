"""How the weights of a run have moved: spectra, effective ranks, alignment of heads, switching.

    switchlora analyze RUN [--out FOLDER] [--base first] [--layers 0,11] [--device cuda]

Reads every published checkpoint of RUN and its metrics.jsonl; writes analysis.json and plots into RUN/analysis.
    spectra_weights.png, spectra_updates.png   singular values by kind of matrix, mean over layers, one line
                                               per checkpoint (SwitchLoRA's Figures 10 and 11)
    effective_rank.png                         of weights and of updates over training (LTE's Figure 14)
    heads.png                                  LTE: cosine of updates and Grassmann distance over heads (Figures 5, 11)
    switching.png                              vectors switched against the schedule's expectation, slots seen in use
An update is W_eff(t) - W_eff(base), W_eff being W + sBA, or the mean of the heads' W + s B_n A_n. The base is step 0:
its weights follow from the seed, or are those of train.init_from; `--base first` takes the first checkpoint instead.
Give the run --checkpoint.keep_every, or only its last checkpoints are there. Slots are seen at checkpoints only, so
those counted are fewer than those used. Full SVDs of large models take minutes per checkpoint: --layers selects layers.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from megatron_switchlora.config.command_line import require_utf8
from megatron_switchlora.config.errors import UserError, ends_on_mistake, require
from megatron_switchlora.disk import replace_text, user_path
from megatron_switchlora.run.figures import decorating
from megatron_switchlora.study.analysis.measures import analyze
from megatron_switchlora.study.analysis.plots import plot_all


def describe(result: dict[str, Any], out: Path) -> str:
    """Return a few lines for the terminal."""
    checkpoints, switched = result["checkpoints"], result["switching"]
    last = checkpoints[-1]
    lines = [f"{result['run']} ({result['method']}): {len(checkpoints)} checkpoints, updates since {result['base']}"]
    lines += [
        f"after step {last['step']}, effective rank, mean over layers: kind, weight, update, update's rank (>1e-3)"
    ]
    for kind, entry in last["kinds"].items():
        numbers = [entry[what]["effective_rank"] for what in ("weight", "update")]
        numbers.append(mean(entry["update"]["rank_by_layer"]))
        lines.append(f"  {kind:<10}" + "".join(f"{number:>9.1f}" for number in numbers))
    for kind, entry in last["heads"].items():
        lines.append(f"  {kind:<10} heads: cosine {entry['cosine']}, Grassmann distance {entry['grassmann']}")
    if any(entry["cosine"] is None for entry in last["heads"].values()):
        lines.append("  no cosine where B is zero, as right after a merge of the reset form: let --checkpoint.interval "
                     "be no multiple of its interval")  # fmt: skip
    if switched:
        lines.append(
            f"switched {sum(switched['switched']):,} vectors, expected {sum(switched['expected']):,.1f} before caps"
        )
    return "\n".join([*lines, f"written: {out}/analysis.json and plots"])


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=user_path, metavar="RUN", help="run folder")
    parser.add_argument("--out", type=user_path, help="where to write; by default RUN/analysis")
    parser.add_argument("--base", choices=["initial", "first"], default="initial", help="what updates count from")
    parser.add_argument("--layers", help="numbers of the decoder layers to read, with commas; by default all")
    parser.add_argument("--device", default="cpu", help="where the SVDs run (default: cpu)")
    arguments = parser.parse_args(argv)
    out = arguments.out or arguments.run / "analysis"
    with ends_on_mistake():
        require_utf8(argv)
        wrong = arguments.layers and not re.fullmatch(r"\d+(,\d+)*", arguments.layers)
        require(not wrong, f"--layers must be numbers with commas, as 0,11,23, not {arguments.layers!r}.")
        try:
            torch.zeros(1, device=arguments.device)
        except (RuntimeError, AssertionError) as error:  # what torch raises without the device
            raise UserError(f"--device {arguments.device} cannot be used here: {str(error).splitlines()[0]}") from None
        layers = set(map(int, arguments.layers.split(","))) if arguments.layers else None
        result = analyze(arguments.run, arguments.base, layers, arguments.device)
        try:
            out.mkdir(parents=True, exist_ok=True)
            replace_text(out / "analysis.json", json.dumps(result) + "\n")
        except OSError as error:
            raise UserError(f"{out} cannot be written ({error}): give another --out.") from None
        with decorating("drawing the plots"):
            plot_all(result, out)
        print(describe(result, out))
