#!/usr/bin/env python3
"""How the weights of a run have moved: spectra, effective ranks, alignment of heads, switching.

    python tools/analyze.py RUN [--out FOLDER] [--base first] [--layers 0,11] [--device cuda]

Reads every published checkpoint of RUN and its metrics.jsonl; writes analysis.json and plots into RUN/analysis.
    spectra_weights.png, spectra_updates.png   singular values by kind of matrix, mean over layers, a line a checkpoint
                                               (SwitchLoRA's Figures 10 and 11)
    effective_rank.png                         of weights and of updates over training (LTE's Figure 14)
    heads.png                                  LTE: cosine of updates and Grassmann distance over heads (Figures 5, 11)
    switching.png                              vectors switched against the schedule's expectation, slots seen in use
An update is W_eff(t) - W_eff(base), W_eff being W + sBA, or the mean of the heads' W + s B_n A_n. The base is step 0:
its weights follow from the seed, or are those of train.init_from; `--base first` takes the first checkpoint instead.
Give the run --checkpoint.keep_every, or only its last checkpoints are there. Slots are seen at checkpoints only, so
those counted are fewer than those used. Full SVDs of large models take minutes a checkpoint: --layers takes some.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any, Optional

import torch
from analyze_plots import plot_all
from torch import Tensor
from tqdm import tqdm

from megatron_switchlora.checkpoint.files import published, verified
from megatron_switchlora.checkpoint.weights import Weights, find_folder
from megatron_switchlora.config.command_line import require_utf8
from megatron_switchlora.config.errors import UserError, require
from megatron_switchlora.config.run import TrainConfig
from megatron_switchlora.disk import replace_text, user_path
from megatron_switchlora.lowrank.schedule import switch_rate
from megatron_switchlora.model.protocol import build_on_meta, initial_value
from megatron_switchlora.planning.counts import projections
from megatron_switchlora.run.figures import decorating
from megatron_switchlora.run.metrics_log import read_records
from megatron_switchlora.study.spectra import effective_rank, head_alignment, numerical_rank, spectrum

Base = Callable[[str], Tensor]


def open_run(run: Path) -> list[Weights]:
    """The weights of every published checkpoint, oldest first.

    Raises:
        UserError: not a run folder, no checkpoint, or a damaged one.
    """
    require((run / "config.yaml").is_file(), f"{run} is not a run folder: it has no config.yaml. Give one of runs/.")
    found = published(run / "checkpoints")
    require(
        bool(found),
        f"The run {run} has no published checkpoint to analyse: let it reach one, and keep them with "
        "--checkpoint.keep_every.",
    )
    return [Weights(verified(folder)) for folder in found]


def matrices(weights: Weights, layers: Optional[set[int]]) -> dict[str, str]:
    """Names of the decoder's matrices, each once whatever heads there are, and their kinds (q_proj, ...)."""
    model = build_on_meta(weights.model, weights.vocab_size)
    linears = [(each.name, each.attribute) for each in model.decoder_linears()]
    return {f"{name}.weight": kind for name, kind in linears if layers is None or _layer(name) in layers}


def _layer(name: str) -> int:
    """The number of a linear's layer: the first in its name."""
    return next(int(word) for word in name.split(".") if word.isdecimal())


def heads_of(weights: Weights, name: str) -> list[str]:
    """The names under which LTE's heads hold the factors of a matrix."""
    stem = name.removesuffix("weight")
    return [f"{head}/{name}" for head in _head_prefixes(weights) if f"{head}/{stem}lora_A" in weights.archive]


def _head_prefixes(weights: Weights) -> list[str]:
    names = weights.archive.names()
    return sorted({name.split("/")[0] for name in names if name.startswith("head_") and "/" in name})


def make_base(weights: list[Weights], choice: str) -> tuple[Base, str]:
    """What updates are measured from, and words for it."""
    first, train = weights[0], _train_section(weights[0])
    start = train["init_from"]
    if choice == "first" or first.state["step"] == 0:
        return first.read, f"the checkpoint of step {first.state['step']}"
    if start:
        try:
            return Weights(verified(find_folder(Path(start)))).read, f"train.init_from {start}"
        except UserError as error:
            raise UserError(f"The run began at train.init_from {start}: {error} Or give --base first.") from None
    seed = train["seed"]

    def drawn(name: str) -> Tensor:
        return initial_value(name, first.shape(name), first.model, seed)

    return drawn, f"the initial weights of seed {seed}"


def _train_section(weights: Weights) -> dict[str, Any]:
    return asdict(TrainConfig()) | weights.config.get("train", {})


def describe(values: list[Tensor]) -> dict[str, Any]:
    """The spectra of one kind's layers: their mean, and ranks by layer."""
    ranks = [effective_rank(value) for value in values]
    return {
        "spectrum": torch.stack(values).mean(0).tolist(),
        "effective_rank": mean(ranks),
        "effective_rank_by_layer": ranks,
        "rank_by_layer": [numerical_rank(value) if float(value.max()) > 0 else 0 for value in values],
    }


def spectra(weights: list[Weights], base: Base, kinds: dict[str, str], device: str) -> list[dict[str, Any]]:
    """For each checkpoint and kind of matrix, the spectra of weights and of updates."""
    found: list[dict[str, dict[str, list[Tensor]]]] = [{} for _ in weights]
    for name, kind in tqdm(kinds.items(), desc="Singular values", unit=" matrices", disable=None):
        start = base(name).to(device)
        for checkpoint, entry in zip(weights, found, strict=True):
            now = checkpoint.read(name).to(device)
            lists = entry.setdefault(kind, {"weight": [], "update": []})
            lists["weight"].append(spectrum(now).cpu())
            lists["update"].append(spectrum(now - start).cpu())
    return [
        {kind: {what: describe(v) for what, v in lists.items()} for kind, lists in entry.items()} for entry in found
    ]


def alignment(weights: Weights, kinds: dict[str, str]) -> dict[str, Any]:
    """By kind, the mean over layers of the heads' cosine and Grassmann distance; empty for a run without heads."""
    found: dict[str, list[dict[str, Optional[float]]]] = {}
    for name, kind in kinds.items():
        heads = [weights.factors(head) for head in heads_of(weights, name)]
        if heads:
            found.setdefault(kind, []).append(head_alignment(heads))
    return {kind: {key: _mean([entry[key] for entry in entries]) for key in ("cosine", "grassmann")}
            for kind, entries in found.items()}  # fmt: skip


def _mean(values: list[Optional[float]]) -> Optional[float]:
    known = [value for value in values if value is not None]
    return mean(known) if known else None


def switching(run: Path, weights: list[Weights]) -> dict[str, Any]:
    """Vectors switched by each step, beside the schedule's expectation before its caps, and slots seen in use; of
    several heads those of head 0, whose records these are."""
    last = weights[-1]
    method, train = last.method, _train_section(last)
    if not method.facts.switches:
        return {}
    head = next((f"{name}/" for name in _head_prefixes(last)), "")
    smaller = [min(p.out_features, p.in_features) for p in projections(last.model)] * last.model.num_layers
    candidates = [count for count in smaller if count > method.rank]
    before = method.full_rank_steps  # without vectors to switch
    records = [record for record in read_records(run / "metrics.jsonl") if "switched" in record]
    records = [record for record in records if record["step"] > before]
    require(
        bool(records) or last.state["step"] <= before,
        f"{run / 'metrics.jsonl'} has no records of switching: put the run's own file back.",
    )
    total_steps = method.switch.total_steps or train["steps"] - before
    start = 2 * len(candidates) * method.rank / method.switch.interval0  # both sides of every layer that switches
    expected = [
        start * switch_rate(record["step"] - before - 1, method.switch.ratio, total_steps) for record in records
    ]
    seen: dict[str, list[set[int]]] = {side: [set() for _ in candidates] for side in "AB"}
    used = []
    for checkpoint in (each for each in weights if each.state["step"] > before):
        entry: dict[str, float] = {"step": checkpoint.state["step"]}
        for side in "AB":
            for slots, row in zip(
                seen[side], checkpoint.archive.read(f"{head}switch.slots_{side}").tolist(), strict=True
            ):
                slots.update(row)
            entry[side] = mean(len(slots) / count for slots, count in zip(seen[side], candidates, strict=True))
        used.append(entry)
    return {
        "steps": [record["step"] for record in records],
        "switched": [record["switched"] for record in records],
        "expected": expected,
        "slots_seen": used,
    }


def analyze(run: Path, base: str, layers: Optional[set[int]], device: str) -> dict[str, Any]:
    """Everything, as it goes into analysis.json."""
    weights = open_run(run)
    kinds = matrices(weights[-1], layers)
    require(bool(kinds), f"{run} has no layer among --layers {sorted(layers or ())}: they count from 0.")
    start, words = make_base(weights, base)
    found = spectra(weights, start, kinds, device)
    checkpoints = [
        {"step": checkpoint.state["step"], "kinds": entry, "heads": alignment(checkpoint, kinds)}
        for checkpoint, entry in zip(weights, found, strict=True)
    ]
    return {"run": run.name, "method": weights[-1].method.name, "base": words, "checkpoints": checkpoints,
            "switching": switching(run, weights)}  # fmt: skip


def words_of(result: dict[str, Any], out: Path) -> str:
    """A few lines for the terminal."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=user_path, metavar="RUN", help="run folder")
    parser.add_argument("--out", type=user_path, help="where to write; by default RUN/analysis")
    parser.add_argument("--base", choices=["initial", "first"], default="initial", help="what updates count from")
    parser.add_argument("--layers", help="numbers of the decoder layers to read, with commas; by default all")
    parser.add_argument("--device", default="cpu", help="where the SVDs run (default: cpu)")
    arguments = parser.parse_args()
    out = arguments.out or arguments.run / "analysis"
    try:
        require_utf8(sys.argv[1:])
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
        print(words_of(result, out))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
