"""Table and plot of tools/compare.py's results, written beside the JSON as .md and .png.

A method's row is its best point: that of its finished sweep, else the best so far, marked. Losses are in nats per
token; a deviation is the sample's over seeds. Perplexity is exp(loss), seed by seed. Gradient bytes are those that a
rank handed to data-parallel collectives per step; where a single data rank communicates nothing they are the formula's
(`planning/memory.py`) for two data ranks. The plot has all runs pale and the best points' bold, over steps and tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Optional

from megatron_switchlora.config.ds_config import read_ds_config, resolve_ds_config, zero_settings
from megatron_switchlora.config.field_checks import expanded
from megatron_switchlora.config.run import RunConfig
from megatron_switchlora.disk import replace_text
from megatron_switchlora.distributed.mesh import mesh_sizes
from megatron_switchlora.planning.traffic import gradient_bytes
from megatron_switchlora.run.figures import decorating, new_figure, save_figure
from megatron_switchlora.run.metrics_log import perplexity
from megatron_switchlora.shipped import home_path
from megatron_switchlora.study.comparison.results import Results
from megatron_switchlora.study.comparison.settings import Point, Setting, run_key

Run = dict[str, Any]
HEAD = (
    "| method | rank | trainable | lr, dense_lr | seeds | validation loss | perplexity | gradient bytes per step | "
    "step time | peak memory |\n|---|---|---|---|---|---|---|---|---|---|"
)


def write_report(setting: Setting, configs: dict[str, RunConfig], results: Results, plot: bool = True) -> str:
    """Write the table and the plot, and return the table."""
    rows, notes = comparison_rows(setting, configs, results)
    text = "\n".join([
        f"# {setting.name}", "", setting.about.strip(), "", *rows, "", *notes, *_facts(setting, results)
    ])  # fmt: skip
    replace_text(results.path.with_suffix(".md"), text + "\n")
    if plot:
        path = results.path.with_suffix(".png")
        with decorating(f"drawing {path.name}"):
            _plot(setting, results, path)
    return text


def comparison_rows(setting: Setting, configs: dict[str, RunConfig], results: Results) -> tuple[list[str], list[str]]:
    """Return the lines of the table and the notes below it."""
    rows, notes = [HEAD], set[str]()
    for method, config in configs.items():
        point, runs = best_runs(setting, results, method)
        rows.append(_row(setting, results, method, config, point, runs, notes))
    return rows, sorted(notes)


def best_runs(setting: Setting, results: Results, method: str) -> tuple[Optional[Point], list[Run]]:
    """Return the rates that count for a method and its runs at full length there, by seed."""
    complete = [run for run in of_method(setting, results, method) if not run["sweep"]]
    point = results.chosen(method)
    if point is None and complete:
        best = min(complete, key=_loss)
        point = Point(best["lr"], best["dense_lr"])
    at_point = [run for run in complete if point and (run["lr"], run["dense_lr"]) == (point.lr, point.dense_lr)]
    return point, sorted(at_point, key=lambda run: run["seed"])


def of_method(setting: Setting, results: Results, method: str) -> list[Run]:
    """Return a method's runs under the setting as it is now; those of earlier options stay in the file unseen."""
    runs = []
    for key, run in results.content["runs"].items():
        if run["method"] == method:
            point = Point(run["lr"], run["dense_lr"])
            options = setting.run_options(method, point, run["seed"], run["sweep"])
            if key == run_key(method, point, run["seed"], options):
                runs.append(run)
    return runs


def _loss(run: Run) -> float:
    return math.inf if run["val_loss"] is None else float(run["val_loss"])


def _row(
    setting: Setting, results: Results, method: str, config: RunConfig, point: Optional[Point], runs: list[Run],
    notes: set[str],
) -> str:  # fmt: skip
    rank = str(config.method.rank) if "rank" in config.method.facts.reads else "-"
    if point is None or not runs:
        time = _time(setting, results, method, notes)
        return f"| {method} | {rank} |" + " |" * 6 + (f" {time} | |" if time else " | |")
    optim = replace(config.optim, lr=point.lr, dense_lr=point.dense_lr)
    rates = f"{point.lr:g}, {replace(config, optim=optim).dense_lr:g}"
    if results.chosen(method) is None:
        rates += " (sweep under way)"
    elif setting.sweep == "grid" and _at_edge(setting, method, point):
        rates += " (edge)"
        notes.add("(edge): the best rate is the first or last of its list, so a better one may lie beyond.")
    losses = [_loss(run) for run in runs]
    perplexities = [perplexity(loss) if math.isfinite(loss) else loss for loss in losses]
    known = next((run for run in runs if run["trainable"]), None)
    heads = f"{config.heads} x " if config.heads > 1 else ""  # each of LTE's heads trains this many
    share = f"{heads}{known['trainable'] / known['full_rank']:.1%}" if known else ""
    memory = max((run["peak_memory_bytes"] or 0 for run in runs), default=0)
    ranks = setting.launch(method)[1]
    several = f"{ranks} x " if ranks > 1 else ""  # rank 0's is measured
    cells = [
        method, rank, share, rates, str(len(runs)), _spread(losses, 3), _spread(perplexities, 2),
        _gradients(setting, method, config, known, notes), _time(setting, results, method, notes),
        f"{several}{memory / 1e6:,.0f} MB" if memory else "",
    ]  # fmt: skip
    if known and known["device"] == "cpu" and memory:
        notes.add("Peak memory is that of the whole process on the CPU, libraries included.")
    return f"| {' | '.join(cells)} |"


def _spread(values: list[float], digits: int) -> str:
    """Return mean and deviation over seeds; infinite where one has diverged."""
    if not all(map(math.isfinite, values)):
        return f"inf ({sum(not math.isfinite(value) for value in values)} of {len(values)} diverged)"
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def _at_edge(setting: Setting, method: str, point: Point) -> bool:
    starts = setting.methods[method].starts()
    ends: list[Callable[[Point], Optional[float]]] = [lambda p: p.lr, lambda p: p.dense_lr]
    for rate in ends:
        values = sorted({value for p in starts if (value := rate(p)) is not None})
        if len(values) > 1 and rate(point) in (values[0], values[-1]):
            return True
    return False


def _gradients(setting: Setting, method: str, config: RunConfig, run: Optional[Run], notes: set[str]) -> str:
    if run is None:
        return ""
    if config.parallel.lte_heads > 1:
        notes.add("Merges: bytes that a rank gives to other LTE heads, on average per step.")
        return f"{run['dp_bytes'] / 1e6:,.2f} MB, merges {run['merge_bytes'] / 1e6:,.2f} MB"
    if run["dp_bytes"]:
        return f"{run['dp_bytes'] / 1e6:,.2f} MB"
    notes.add(
        "Gradient bytes (formula): one data rank communicates nothing; these are for two data-parallel ranks, each "
        "doing the same work as this one."
    )
    dp = mesh_sizes(config.parallel, setting.launch(method)[1])["dp"]
    config = replace(config, train=replace(config.train, global_batch_size=2 * config.train.global_batch_size))
    path = setting.methods[method].options.get("ds_config", setting.ds_config)
    zero = zero_settings(
        resolve_ds_config(read_ds_config(path and str(home_path(expanded("ds_config", path)))), config, dp)
    )
    given, _ = gradient_bytes(config, run["vocab_size"], config.parallel.tp, 2, zero)
    return f"{given / 1e6:,.2f} MB (formula)"


def _time(setting: Setting, results: Results, method: str, notes: set[str]) -> str:
    timing = results.content["timing"].get(method)
    if timing is None:
        return ""
    notes.add(
        f"Step time: ratio to {setting.reference}'s, median over rounds of --timing (lowest to highest), one run at a "
        "time. It is of the median step, so merges, restarts and decompositions are left out."
    )
    ranks, reference = setting.launch(method)[1], setting.launch(setting.reference)[1]
    other = f", {ranks} ranks against {reference}" if ranks != reference else ""
    return f"{timing['ratio']:.2f} ({timing['lowest']:.2f} to {timing['highest']:.2f}{other})"


def _facts(setting: Setting, results: Results) -> list[str]:
    runs = results.content["runs"].values()
    revisions = sorted({str(run["revision"])[:12] for run in runs})
    places = [run["machine"] for run in runs] + [timing["machine"] for timing in results.content["timing"].values()]
    machines = sorted({f"{m['cpus']} CPUs ({m['processor']}), {m['system']}" for m in places})
    device = f" on {results.device}" if results.device not in (None, "cpu") else ""
    data = " --data DATA" if "{data}" in str(setting.options) else ""
    changes = "".join(f" --set {name}={value}" for name, value in setting.changes.items())
    return [
        f"Made by `tools/compare.py {setting.name}{data}{changes}`, step times with `--timing`.",
        f"{len(runs)} runs{device}, of which {sum(run['diverged'] for run in runs)} diverged; revisions "
        f"{', '.join(revisions) or 'none'}; {'; '.join(machines)}.",
    ]


def _plot(setting: Setting, results: Results, path: Path) -> None:
    """Draw the validation loss over steps and over tokens; a diverged run's curve ends where it did."""
    figure = new_figure(13, 5)
    left, right = figure.subplots(1, 2, sharey=True)
    top = 0.0  # the best runs from their second evaluation on are in sight: the fall from the start hides all else
    for number, method in enumerate(setting.methods):
        _, best = best_runs(setting, results, method)
        top = max([top, *(run["curve"][min(1, len(run["curve"]) - 1)][2] for run in best if run["curve"])])
        for run in of_method(setting, results, method):
            bold = run in best
            style: dict[str, Any] = {"color": f"C{number % 10}", "linestyle": "-" if number < 10 else "--"}
            style |= {"linewidth": 1.6, "zorder": 3} if bold else {"linewidth": 0.6, "alpha": 0.25}
            if bold and run is best[0]:
                style["label"] = method
            for axes, column in ((left, 0), (right, 1)):
                axes.plot([entry[column] for entry in run["curve"]], [entry[2] for entry in run["curve"]], **style)
    left.set(xlabel="step", ylabel="validation loss (nats a token)", title=setting.name)
    right.set(xlabel="tokens", title="bold: best rates, one line per seed; pale: other rates")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.set_ylim(top=1.02 * top if top else None)
    save_figure(figure, path)
