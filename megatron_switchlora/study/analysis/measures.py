"""Measures of a run's weights, from its checkpoints and records: spectra, ranks, alignment of heads, switching."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any, Optional

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_switchlora.checkpoint.files import published, verified
from megatron_switchlora.checkpoint.weights import Weights, find_folder
from megatron_switchlora.config.errors import UserError, require
from megatron_switchlora.config.train import TrainConfig
from megatron_switchlora.distributed.head_names import of_head
from megatron_switchlora.lowrank.schedule import switch_rate
from megatron_switchlora.model.protocol import build_on_meta, initial_value, projections
from megatron_switchlora.run.metrics_log import read_records
from megatron_switchlora.study.analysis.spectra import effective_rank, head_alignment, numerical_rank, spectrum

Base = Callable[[str], Tensor]


def open_run(run: Path) -> list[Weights]:
    """Open the weights of every published checkpoint, oldest first.

    Raises:
        UserError: not a run folder, no checkpoint, or a damaged one.
    """
    require((run / "config.yaml").is_file(), f"{run} is not a run folder: it has no config.yaml. Give one of runs/.")
    folders = published(run / "checkpoints")
    require(
        bool(folders),
        f"The run {run} has no published checkpoint to analyse: let it reach one, and keep them with "
        "--checkpoint.keep_every.",
    )
    return [Weights(verified(folder)) for folder in folders]


def matrices(weights: Weights, layers: Optional[set[int]]) -> dict[str, str]:
    """Return the names of the decoder's matrices, each once whatever heads there are, and their kinds (q_proj, ...)."""
    model = build_on_meta(weights.model, weights.vocab_size)
    linears = [(each.name, each.attribute) for each in model.decoder_linears()]
    return {f"{name}.weight": kind for name, kind in linears if layers is None or _layer(name) in layers}


def _layer(name: str) -> int:
    """Return the number of a linear's layer: the first in its name."""
    return next(int(word) for word in name.split(".") if word.isdecimal())


def heads_of(weights: Weights, name: str) -> list[str]:
    """Return the names under which LTE's heads hold the factors of a matrix."""
    stem = name.removesuffix("weight")
    return [of_head(head, name) for head in weights.heads if of_head(head, f"{stem}lora_A") in weights.archive]


def make_base(weights: list[Weights], choice: str) -> tuple[Base, str]:
    """Return the weights that updates are measured from, and their description."""
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
    """Summarise the spectra of one kind's layers: their mean, and ranks by layer."""
    ranks = [effective_rank(value) for value in values]
    return {
        "spectrum": torch.stack(values).mean(0).tolist(),
        "effective_rank": mean(ranks),
        "effective_rank_by_layer": ranks,
        "rank_by_layer": [numerical_rank(value) if float(value.max()) > 0 else 0 for value in values],
    }


def spectra(weights: list[Weights], base: Base, kinds: dict[str, str], device: str) -> list[dict[str, Any]]:
    """Return the spectra of weights and of updates, for each checkpoint and kind of matrix."""
    entries: list[dict[str, dict[str, list[Tensor]]]] = [{} for _ in weights]
    for name, kind in tqdm(kinds.items(), desc="Singular values", unit=" matrices", disable=None):
        start = base(name).to(device)
        for checkpoint, entry in zip(weights, entries, strict=True):
            now = checkpoint.read(name).to(device)
            lists = entry.setdefault(kind, {"weight": [], "update": []})
            lists["weight"].append(spectrum(now).cpu())
            lists["update"].append(spectrum(now - start).cpu())
    return [
        {kind: {what: describe(v) for what, v in lists.items()} for kind, lists in entry.items()} for entry in entries
    ]


def alignment(weights: Weights, kinds: dict[str, str]) -> dict[str, Any]:
    """Return the mean over layers of the heads' cosine and Grassmann distance by kind; nothing without heads."""
    alignments: dict[str, list[dict[str, Optional[float]]]] = {}
    for name, kind in kinds.items():
        heads = [weights.factors(head) for head in heads_of(weights, name)]
        if heads:
            alignments.setdefault(kind, []).append(head_alignment(heads))
    return {kind: {key: _mean([entry[key] for entry in entries]) for key in ("cosine", "grassmann")}
            for kind, entries in alignments.items()}  # fmt: skip


def _mean(values: list[Optional[float]]) -> Optional[float]:
    known = [value for value in values if value is not None]
    return mean(known) if known else None


def switching(run: Path, weights: list[Weights]) -> dict[str, Any]:
    """Return the vectors switched by each step, the schedule's expectation before its caps, and slots seen in use.

    Of several heads these are those of head 0, whose records these are.
    """
    last = weights[-1]
    method, train = last.method, _train_section(last)
    if not method.facts.switches:
        return {}
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
    stored = {side: f"switch.slots_{side}" for side in "AB"}
    if last.heads:
        stored = {side: of_head(last.heads[0], name) for side, name in stored.items()}
    used = []
    for checkpoint in (each for each in weights if each.state["step"] > before):
        entry: dict[str, float] = {"step": checkpoint.state["step"]}
        for side in "AB":
            for slots, row in zip(seen[side], checkpoint.archive.read(stored[side]).tolist(), strict=True):
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
    """Return all measures, as they go into analysis.json."""
    weights = open_run(run)
    kinds = matrices(weights[-1], layers)
    require(bool(kinds), f"{run} has no layer among --layers {sorted(layers or ())}: they count from 0.")
    start, description = make_base(weights, base)
    by_checkpoint = spectra(weights, start, kinds, device)
    checkpoints = [
        {"step": checkpoint.state["step"], "kinds": entry, "heads": alignment(checkpoint, kinds)}
        for checkpoint, entry in zip(weights, by_checkpoint, strict=True)
    ]
    return {"run": run.name, "method": weights[-1].method.name, "base": description, "checkpoints": checkpoints,
            "switching": switching(run, weights)}  # fmt: skip
