"""The figure of one training step: what happens in which module, and what crosses ranks. Written as SVG.

The figure is drawn from `STEPS`. A test asks that every module in it exists and that the committed file shows them.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_switchlora.disk import replace_bytes
from megatron_switchlora.run.figures import new_figure
from megatron_switchlora.shipped import ROOT

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PATH = ROOT / "docs" / "training_step.svg"
REPEATED = "for each micro-batch"


@dataclass(frozen=True)
class Step:
    """A box of the figure: `modules` lie below the package, `crosses` is what ranks exchange, with the mesh axis."""

    title: str
    modules: tuple[str, ...]
    crosses: str = ""
    repeated: bool = False


STEPS = (
    Step("Take this rank's samples of batch k", ("data/loader.py",)),
    Step(
        "Forward: y = (W + s B A) x in every adapted linear",
        ("model/llama/model.py", "distributed/linear.py", "lowrank/linear.py", "lowrank/merged.py"),
        "tp: activations, all-reduce",
        True,
    ),
    Step("Loss over a vocabulary that is split", ("distributed/cross_entropy.py",), "tp: maxima and sums", True),
    Step(
        "Backward: gradients of A, B and dense tensors",
        ("train/engine.py", "lowrank/merged.py"),
        "tp: input gradients\ndp: gradients (ZeRO 0, 1: last only)",
        True,
    ),
    Step(
        "Apply the switches planned a step ago: fold into W, swap vectors, reset and freeze counterparts",
        ("methods/switchlora.py", "lowrank/switch.py", "optim/row_adamw.py"),
    ),
    Step(
        "Plan the next step's switches from (seed, step), start fetching their candidates",
        ("lowrank/schedule.py", "lowrank/bank.py"),
        "tp or dp: rows of the bank",
    ),
    Step("Norm and clip", ("train/engine.py", "optim/head_clip.py"), "dp, tp: squared norms"),
    Step("Row-step AdamW on ZeRO's flat partitions", ("optim/row_adamw.py", "optim/layout.py")),
    Step("Gather the updated parameters (ZeRO 1 and 2)", ("train/engine.py",), "dp: trainable parameters"),
    Step("Merge LTE heads, every T steps", ("methods/lte/merging.py",), "lte: factors or products"),
    Step("Agree on loss, health and votes", ("train/engine.py",), "all ranks: loss, health, votes"),
    Step(
        "Record; evaluate and save when due",
        ("train/trainer.py", "train/results.py", "run/metrics_log.py", "checkpoint/saver.py"),
    ),
)

ROW, WIDTH = 0.72, 11.0  # inches
BOX, MODULES, CROSSES = (0.55, 4.55), 5.25, 8.5  # columns: left and width of the boxes; left ends of the texts


def draw(path: Path = PATH) -> None:
    """Write the figure."""
    import matplotlib

    figure = new_figure(WIDTH, ROW * (len(STEPS) + 0.8))
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set(xlim=(0, WIDTH), ylim=(len(STEPS) + 0.3, -0.5))
    axes.axis("off")
    for left, text in ((BOX[0], "what happens"), (MODULES, "module"), (CROSSES, "what crosses ranks")):
        axes.text(left, -0.28, text, fontsize=9, color="#555555")
    for number, step in enumerate(STEPS):
        _draw_step(axes, number, step)
    repeated = [number for number, step in enumerate(STEPS) if step.repeated]
    axes.plot([0.42] * 2, [repeated[0] + 0.05, repeated[-1] + 0.8], color="#c05000", linewidth=2)
    middle = (repeated[0] + repeated[-1] + 0.85) / 2
    axes.text(0.22, middle, REPEATED, rotation=90, fontsize=9, color="#c05000", ha="center", va="center")
    image = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "megatron_switchlora"}):
        figure.savefig(image, format="svg", facecolor="white", metadata={"Date": None})
    replace_bytes(path, image.getvalue())


def _draw_step(axes: Axes, number: int, step: Step) -> None:
    from matplotlib.patches import FancyBboxPatch

    left, width = BOX
    color = "#fff1e0" if step.repeated else "#e8f0fa"
    axes.add_patch(
        FancyBboxPatch((left, number + 0.1), width, 0.66, boxstyle="round,pad=0,rounding_size=0.08", facecolor=color,
                       edgecolor="#444444", linewidth=0.8)
    )  # fmt: skip
    axes.text(left + 0.12, number + 0.43, _in_two(step.title), fontsize=9.5, va="center")
    axes.text(MODULES, number + 0.43, "\n".join(_pairs(step.modules)), fontsize=8, family="monospace", va="center")
    axes.text(CROSSES, number + 0.43, step.crosses, fontsize=9, va="center", color="#1f5f2f")
    if number + 1 < len(STEPS):
        axes.annotate("", (left + width / 2, number + 1.1), (left + width / 2, number + 0.76),
                      arrowprops={"arrowstyle": "->", "color": "#444444"})  # fmt: skip


def _in_two(title: str) -> str:
    """Break a long title into two lines."""
    if len(title) < 52:
        return title
    cut = title.rindex(" ", 0, 52)
    return f"{title[:cut]}\n{title[cut + 1 :]}"


def _pairs(modules: tuple[str, ...]) -> list[str]:
    """Return at most two modules per line."""
    return [", ".join(modules[start : start + 2]) for start in range(0, len(modules), 2)]
