"""Plots, and whatever else only decorates: none of it may fail a run.

Figures are drawn without pyplot and without a display: what MPLBACKEND names (a notebook exports its own to the shells
that it starts) is not asked for. Titles, labels and legends are plain text, so that a name may hold dollar signs.
matplotlib is imported by the first figure only.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_switchlora.disk import replace_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def _print_line(text: str) -> None:
    print(text, flush=True)


@contextlib.contextmanager
def decorating(what: str, print_line: Callable[[str], None] = _print_line) -> Iterator[None]:
    """Turn whatever goes wrong inside into one line of warning; `what` is its subject, as "loss.png"."""
    try:
        yield
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        with contextlib.suppress(OSError):  # the terminal is gone
            print_line(f"warning: {what} failed ({reason}); nothing else depends on it.")


@contextlib.contextmanager
def _any_backend() -> Iterator[None]:
    """matplotlib refuses to be imported where MPLBACKEND names what is not installed."""
    given = os.environ.pop("MPLBACKEND", None)
    try:
        yield
    finally:
        if given is not None:
            os.environ["MPLBACKEND"] = given


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches."""
    with _any_backend():
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: Path, dpi: int = 120) -> None:
    """Write a figure as PNG, with a legend where a line has a label and none was made.

    Raises:
        OSError: the folder cannot be written.
    """
    for axes in figure.axes:
        if axes.get_legend() is None and axes.get_legend_handles_labels()[0]:
            axes.legend()
    _take_literally(figure)
    figure.tight_layout()
    image = io.BytesIO()
    figure.savefig(image, dpi=dpi, format="png")
    replace_bytes(path, image.getvalue())


def _take_literally(figure: Figure) -> None:
    """Read no mathematics in what we have named; the numbers at an axis have some of matplotlib's own."""
    texts = [text for axes in figure.axes for text in (axes.title, axes.xaxis.label, axes.yaxis.label)]
    texts += [text for axes in figure.axes if (legend := axes.get_legend()) for text in legend.get_texts()]
    for text in [*texts, *figure.texts]:
        text.set_parse_math(False)


class _Patient(io.FileIO):
    """A terminal, pipe or log file that may be gone or full: what cannot be written is lost."""

    def write(self, data: object) -> int:
        with contextlib.suppress(OSError):
            return super().write(data)  # type: ignore[arg-type]
        return memoryview(data).nbytes  # type: ignore[arg-type]


def outlive_terminal() -> None:
    """Let this process go on when the reader of its output goes (`| head`), its disk is full, or a name in it cannot be
    shown."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed before Python began
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8", errors="backslashreplace"))  # noqa: SIM115
            continue
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
        with contextlib.suppress(OSError, ValueError):  # no file of this process
            handle = _Patient(stream.fileno(), "wb", closefd=False)
            text = io.TextIOWrapper(
                io.BufferedWriter(handle), stream.encoding, "backslashreplace", line_buffering=True, write_through=True
            )
            setattr(sys, name, text)
