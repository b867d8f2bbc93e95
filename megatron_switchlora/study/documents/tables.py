"""Tables of the documentation, each made from a JSON file in benchmarks/."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from megatron_switchlora.disk import read_json
from megatron_switchlora.run.metrics_log import perplexity
from megatron_switchlora.shipped import ROOT
from megatron_switchlora.study.comparison.report import comparison_rows
from megatron_switchlora.study.comparison.results import Results
from megatron_switchlora.study.comparison.settings import read_setting, validate_points
from megatron_switchlora.study.documents import benchmark_tables
from megatron_switchlora.study.markdown import markdown
from megatron_switchlora.study.volume.report import by_kind, by_part


def read(name: str) -> Any:
    """Return the content of a file of results."""
    return read_json(ROOT / "benchmarks" / f"{name}.json")


def comparison(name: str) -> str:
    """Return the table that `tools/compare.py NAME --report` writes, with its notes."""
    setting = read_setting(Path(name), None, {})
    results = Results(ROOT / "benchmarks" / f"compare_{name}.json")
    rows, notes = comparison_rows(setting, validate_points(setting, Path("data")), results)
    count, diverged = len(results.content["runs"]), sum(run["diverged"] for run in results.content["runs"].values())
    notes.append(f"The file holds {count} runs, of which {diverged} diverged.")
    return "\n".join([*rows, "", *(f"- {note}" for note in notes)])


def step_times(name: str) -> str:
    """Return the ratios of step times that `tools/compare.py --timing` has measured."""
    rows = [
        [method, f"{entry['ratio']:.2f}", f"{entry['lowest']:.2f} to {entry['highest']:.2f}"]
        for method, entry in read(f"compare_{name}")["timing"].items()
    ]
    return markdown(["method", "step time, full-rank = 1", "lowest to highest round"], rows)


def spread(values: Sequence[float], digits: int) -> str:
    """Return the mean of several values with their deviation."""
    return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}" if len(values) > 1 else f"{values[0]:.{digits}f}"


def seeds(name: str) -> str:
    """Return the losses of every point by seed, of whole runs."""
    points: dict[tuple[str, float, float], dict[int, float]] = {}
    for run in read(f"compare_{name}")["runs"].values():
        if not run["sweep"]:
            points.setdefault((run["method"], run["lr"], run["dense_lr"]), {})[run["seed"]] = run["val_loss"]
    return _losses(["method", "lr, dense_lr"], {
        (method, f"{lr:g}, {dense_lr:g}"): losses for (method, lr, dense_lr), losses in sorted(points.items())
    })  # fmt: skip


def _losses(head: list[str], points: dict[tuple[str, ...], dict[int, float]]) -> str:
    rows = []
    for labels, found in points.items():
        losses = [found[seed] for seed in sorted(found)]
        listed = ", ".join(f"{loss:.3f}" for loss in losses)
        rows.append([*labels, listed, spread(losses, 3), spread([perplexity(loss) for loss in losses], 2)])
    return markdown([*head, "validation loss, seeds 0, 1, ...", "mean", "perplexity"], rows)


def longer_runs() -> str:
    """Return the best points of benchmarks/learning_table.json at 1,200 steps."""
    points: dict[tuple[str, ...], dict[int, float]] = {}
    for key, run in read("learning_table")["runs"].items():
        method, _, steps, _, rank, _, lr, _, dense_lr, _, seed = key.split()
        if steps == "1200":
            points.setdefault((method, rank, f"{lr}, {dense_lr}"), {})[int(seed)] = run["val_loss"]
    best = {labels: found for labels, found in points.items() if len(found) > 1}
    return _losses(["method", "rank", "lr, dense_lr"], best)


def curves(name: str, steps: Sequence[int]) -> str:
    """Return the validation losses of whole runs at some of their steps."""
    rows = []
    for run in read(f"compare_{name}")["runs"].values():
        at = {step: loss for step, _, loss in run["curve"]}
        losses = [f"{at[step]:.3f}" for step in steps]
        rates = f"{run['lr']:g}, {run['dense_lr']:g}"
        rows.append([run["method"], rates, *losses, f"{perplexity(run['val_loss']):.2f}"])
    head = [f"step {step:,}" for step in steps]
    return markdown(["method", "lr, dense_lr", *head, "perplexity at the end"], sorted(rows))


def update_ranks() -> str:
    """Return effective ranks and ranks of weights and updates, means over all adapted matrices."""
    rows = []
    for method, run in read("analysis_tiny_shakespeare")["runs"].items():
        first, last = run["checkpoints"][0], run["checkpoints"][-1]
        cells = [_mean_rank(last, "weight", "effective_rank_by_layer")]
        for measure in ("effective_rank_by_layer", "rank_by_layer"):
            cells.append(", ".join(_mean_rank(each, "update", measure) for each in (first, last)))
        rows.append([method, f"{run['val_loss']:.3f}", *cells])
    head = ["method", "loss", "effective rank of W, step 600", "of the update, steps 50, 600",
            "rank of the update, steps 50, 600"]  # fmt: skip
    return markdown(head, rows)


def _mean_rank(checkpoint: dict[str, Any], what: str, measure: str) -> str:
    return f"{mean(rank for kind in checkpoint['kinds'].values() for rank in kind[what][measure]):.0f}"


def slow_link() -> str:
    """Return speed and loss on two hosts with and without a slow link."""
    found, rows = read("slow_link"), []
    tokens = 16 * 128  # of a step in the setting tiny_shakespeare
    for method, slow in found["slow"].items():
        fast, reached = found["fast"][method], slow["target_reached"]
        # A file written before median_step_seconds was recorded has its rate at the median step.
        steps = [run.get("median_step_seconds", tokens / run["tokens_per_second"]) for run in (fast, slow)]
        rows.append([
            method, f"{slow['gradient_bytes_a_step'] / 1e6:.2f} MB", f"{slow['sent_bytes_a_step'] / 1e6:.2f} MB",
            f"{steps[0]:.3f} s", f"{steps[1]:.3f} s", f"{tokens / slow['mean_step_seconds']:,.0f}",
            f"{reached['seconds']:.0f} s (step {reached['step']})", f"{slow['curve'][-1][2]:.3f}",
        ])  # fmt: skip
    limit = "100 Mbit/s"
    head = ["method", "gradients per step", "sent per step", "step, no limit", f"step, {limit}", f"tokens/s, {limit}",
            f"loss {found['target']} after", "loss at the end"]  # fmt: skip
    return markdown(head, rows)


def gradient_volume() -> str:
    """Return predicted bytes of a rank and step of the 1.3B model."""
    rows = []
    for case in read("gradient_volume_1.3b"):
        kinds, parts = by_kind(case, "predicted"), by_part(case, "predicted")
        dense = sum(parts.get(part, 0.0) for part in ("embedding", "head", "norms"))
        given, sent = kinds["gradients"], case["wire_predicted"]
        saved = f"{given / case['full_rank_gradients'] - 1:+.1%}"
        rows.append([
            case["name"], *map(_mb, (given - dense, dense)), f"{_mb(given)} ({saved})",
            _mb(kinds["parameters"]), _mb(kinds.get("merges", 0.0)),
            f"{sent / 1e6:,.0f} ({sent / case['full_rank_wire'] - 1:+.1%})",
        ])  # fmt: skip
    head = ["method", "adapters or matrices", "embedding, head, norms", "gradients", "ZeRO's all-gather", "merges",
            "sent"]  # fmt: skip
    return markdown(head, rows)


def _mb(count: float) -> str:
    return f"{count / 1e6:,.1f}" if count else "-"


def step_cost(name: str, divisors: Sequence[int]) -> str:
    """Return ratios to full-rank training's step, of linears and of whole steps, by rank and precision."""
    found = read(name)
    rows = []
    for precision in ("fp32", "bf16"):
        forms = found.get(precision, {})
        for what, kind, ratio in (("linears", "linears", "ratio"), ("step", "forms", "step_ratio")):
            entries = forms.get(kind)
            if entries:
                for measure, label in (("flop_ratio", f"{what}, FLOPs"), (ratio, f"{what}, {precision}")):
                    cells = [_pair(entries, divisor, measure) for divisor in divisors]
                    if [label, *cells] not in rows:
                        rows.append([label, *cells])
    precision, forms = next(reversed([(key, found[key]["forms"]) for key in ("fp32", "bf16") if key in found]))
    for share, label in (("switching", "switching"), ("bank", "of which bank")):
        shares = [forms[f"merged r=h/{divisor}"]["share_of_step"][share] for divisor in divisors]
        rows.append([f"{label}, share of the merged step, {precision}", *(f"{value:.2%}" for value in shares)])
    return markdown(["merged, split", *(f"r = h/{divisor}" for divisor in divisors)], rows)


def _pair(entries: dict[str, Any], divisor: int, measure: str) -> str:
    return ", ".join(f"{entries[f'{form} r=h/{divisor}'][measure]:.2f}" for form in ("merged", "split"))


def merged_cache() -> str:
    """Return time and memory of the policies of `method.merged_cache` over four micro-batches."""
    found = read("step_cpu")
    rows = []
    for policy in found["fp32"]["policies"]:
        entries = [found[precision]["policies"][policy] for precision in ("fp32", "bf16")]
        rows.append([policy, *(f"{entry['step_ratio_to_split']:.2f}" for entry in entries),
                     *(f"{entry['held_bytes'] / 1e6:.0f} MB" for entry in entries)])  # fmt: skip
    head = ["policy", "time, fp32", "time, bf16", "held by forward, fp32", "held by forward, bf16"]
    return markdown(head, rows)


def measures(name: str, shown: dict[str, tuple[str, str]]) -> str:
    """Return some entries of a file, by dotted key: what each is, and the format of its number."""
    found, rows = read(name), []
    for key, (label, form) in shown.items():
        value = found
        for part in key.split("."):
            value = value[part]
        rows.append([label, form.format(value, mega=value / 1e6, giga=value / 1e9)])
    return markdown(["measure", "value"], rows)


TABLES: dict[str, Callable[[], str]] = {
    **{name.replace("_", "-"): partial(comparison, name)
       for name in ("tiny_shakespeare", "tiny_shakespeare_rank6", "books_5m", "books_5m_seeds", "books_5m_long")},
    "books-5m-seeds-by-rate": partial(seeds, "books_5m_seeds"),
    "books-5m-long-curves": partial(curves, "books_5m_long", (300, 600, 1200, 1800, 2400)),
    "books-5m-timing": partial(step_times, "books_5m_timing"),
    "longer-runs": longer_runs,
    "update-ranks": update_ranks,
    "slow-link": slow_link,
    "gradient-volume": gradient_volume,
    "step-cost": partial(step_cost, "step_cpu", (4, 8, 16)),
    "step-cost-tp2": partial(step_cost, "step_cpu_tp2", (4, 8)),
    "merged-cache": merged_cache,
    "peers": lambda: benchmark_tables.peers(read("peers_cpu")),
    "peers-place": lambda: benchmark_tables.place(read("peers_cpu")),
    "peers-targets": lambda: benchmark_tables.peer_targets(read("peers_cpu")),
    "moved": lambda: benchmark_tables.moved(read("moved_1.3b")),
    "profile": lambda: benchmark_tables.profile(read("profile_cpu")),
    "profile-place": lambda: benchmark_tables.place(read("profile_cpu")),
    "switching": partial(measures, "switching_cpu", {
        "vectors_switched_per_step": ("vectors switched per step", "{:.0f}"),
        "share_of_step_in_switching": ("share of a step", "{:.1%}"),
        "step_time_switchlora_over_lora": ("step time, SwitchLoRA over LoRA", "{:.2f}"),
        "optimizer_state_bytes_per_lora_parameter": ("optimizer state per LoRA parameter", "{:.2f} bytes"),
    }),
    "checkpoint": partial(measures, "checkpoint_cpu", {
        "checkpoint_bytes": ("checkpoint", "{mega:.1f} MB"),
        "bytes_by_formula": ("checkpoint by the formula", "{mega:.1f} MB"),
        "stall_seconds.at_once": ("training waits, `checkpoint.background false`", "{:.2f} s"),
        "stall_seconds.background": ("training waits, `checkpoint.background true`", "{:.2f} s"),
        "stall_background_over_at_once": ("ratio of the two", "{:.2f}"),
        "seconds_until_written": ("seconds until the file is written", "{:.2f} s"),
        "step_while_writing_over_quiet_step": ("step while the thread writes, over a quiet step", "{:.1f}"),
    }),
    "export": partial(measures, "export_1.3b", {
        "parameters": ("parameters", "{:,}"),
        "checkpoint_bytes": ("checkpoint read", "{giga:.1f} GB"),
        "exported_bytes": ("export written, bf16", "{giga:.2f} GB"),
        "peak_resident_bytes": ("peak resident memory", "{giga:.2f} GB"),
        "seconds": ("time", "{:.0f} s"),
    }),
    "soak": partial(measures, "soak_cpu", {
        "kills": ("kills", "{}"),
        "runs": ("runs", "{}"),
        "lost_steps": ("most steps repeated after a kill", "{}"),
    }),
}  # fmt: skip
