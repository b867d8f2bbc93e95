"""The plots of tools/analyze.py, from what it writes as analysis.json."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_switchlora.run.figures import new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WINDOWS = 60  # points of the switching curve


def plot_all(result: dict[str, Any], out: Path) -> None:
    """Draw every plot for which there are results."""
    checkpoints = result["checkpoints"]
    _spectra(checkpoints, "weight", result["run"], out / "spectra_weights.png")
    _spectra(checkpoints, "update", f"{result['run']}: updates since {result['base']}", out / "spectra_updates.png")
    _effective_rank(checkpoints, out / "effective_rank.png")
    if any(entry["heads"] for entry in checkpoints):
        _heads(checkpoints, out / "heads.png")
    if result["switching"]:
        _switching(result["switching"], out / "switching.png")


def _save(figure: Figure, path: Path) -> None:
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7)
    save_figure(figure, path)


def _spectra(checkpoints: list[dict[str, Any]], what: str, title: str, path: Path) -> None:
    """Draw a panel for each kind of matrix: singular values, largest first, early checkpoints dark."""
    kinds = list(checkpoints[-1]["kinds"])
    figure = new_figure(13, 6)
    from matplotlib import colormaps  # after the first figure, which sees that it can be imported

    panels = figure.subplots(2, (len(kinds) + 1) // 2, squeeze=False).flatten()
    for kind, axes in zip(kinds, panels, strict=False):
        for number, entry in enumerate(checkpoints):
            color = colormaps["viridis"](number / max(1, len(checkpoints) - 1) * 0.9)
            label = f"step {entry['step']}" if number in (0, len(checkpoints) - 1) else None
            axes.plot(entry["kinds"][kind][what]["spectrum"], color=color, linewidth=1, label=label)
        axes.set(title=kind, yscale="log", xlabel="index", ylabel="singular value, mean over layers")
    for axes in panels[len(kinds) :]:
        axes.remove()
    figure.suptitle(title)
    _save(figure, path)


def _by_kind(axes: Axes, steps: list[int], values: dict[str, list[Any]]) -> None:
    for kind, line in values.items():
        axes.plot(steps, [float("nan") if value is None else value for value in line], "o-", markersize=3, label=kind)


def _effective_rank(checkpoints: list[dict[str, Any]], path: Path) -> None:
    figure = new_figure(11, 4.5)
    steps, kinds = [entry["step"] for entry in checkpoints], list(checkpoints[-1]["kinds"])
    for axes, what in zip(figure.subplots(1, 2), ("weight", "update"), strict=True):
        lines = {kind: [entry["kinds"][kind][what]["effective_rank"] for entry in checkpoints] for kind in kinds}
        _by_kind(axes, steps, lines)
        axes.set(xlabel="step", ylabel="effective rank, mean over layers", title=f"{what}s")
    _save(figure, path)


def _heads(checkpoints: list[dict[str, Any]], path: Path) -> None:
    figure = new_figure(11, 4.5)
    with_heads = [entry for entry in checkpoints if entry["heads"]]
    steps, kinds = [entry["step"] for entry in with_heads], list(with_heads[-1]["heads"])
    titles = {"cosine": "cosine of the heads' updates", "grassmann": "Grassmann distance of the rows of A"}
    for axes, (key, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        _by_kind(axes, steps, {kind: [entry["heads"][kind][key] for entry in with_heads] for kind in kinds})
        axes.set(xlabel="step", ylabel="mean over pairs and layers", title=title)
    _save(figure, path)


def _switching(curves: dict[str, Any], path: Path) -> None:
    """Draw means over windows of steps: single steps scatter by their draw."""
    figure = new_figure(11, 4.5)
    left, right = figure.subplots(1, 2)
    width = max(1, len(curves["steps"]) // WINDOWS)
    for key, style in (("switched", "-"), ("expected", "--")):
        starts = range(0, len(curves["steps"]) - width + 1, width)
        means = [sum(curves[key][start : start + width]) / width for start in starts]
        left.plot([curves["steps"][start] for start in starts], means, style, label=key)
    left.set(xlabel="step", ylabel="vectors per step, all layers and both sides", title="switching")
    for side in "AB":
        values = [entry[side] for entry in curves["slots_seen"]]
        right.plot(
            [entry["step"] for entry in curves["slots_seen"]], values, "o-", markersize=3, label=f"slots of {side}"
        )
    right.set(xlabel="step", ylabel="share of the bank seen live at checkpoints", title="slots", ylim=(0, 1.05))
    _save(figure, path)
