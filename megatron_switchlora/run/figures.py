"""Draw plots and guard other decorations, none of which may fail a run.

Figures need neither pyplot nor a display. MPLBACKEND is ignored, since a notebook exports its own backend to the shells
that it starts. Titles, labels and legends are plain text, so a name may hold dollar signs. The first figure imports
matplotlib.
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
    """Turn any error inside into a one-line warning; `what` is its subject, such as "drawing loss.png"."""
    try:
        yield
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        with contextlib.suppress(OSError):  # the terminal is closed
            print_line(f"warning: {what} failed ({reason}); nothing else depends on it.")


@contextlib.contextmanager
def _any_backend() -> Iterator[None]:
    """Hide MPLBACKEND, since matplotlib fails to import if that backend is not installed."""
    given = os.environ.pop("MPLBACKEND", None)
    try:
        yield
    finally:
        if given is not None:
            os.environ["MPLBACKEND"] = given


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure; width and height are in inches."""
    with _any_backend():
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: Path, dpi: int = 120) -> None:
    """Write a figure as PNG; add a legend to axes that have labels but no legend.

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
    """Turn off mathematics in our texts; the numbers at an axis need it."""
    texts = [text for axes in figure.axes for text in (axes.title, axes.xaxis.label, axes.yaxis.label)]
    texts += [text for axes in figure.axes if (legend := axes.get_legend()) for text in legend.get_texts()]
    for text in [*texts, *figure.texts]:
        text.set_parse_math(False)


class _Patient(io.FileIO):
    """A terminal, pipe or log file that may be closed or full; what cannot be written is lost."""

    def write(self, data: object) -> int:
        with contextlib.suppress(OSError):
            return super().write(data)  # type: ignore[arg-type]
        return memoryview(data).nbytes  # type: ignore[arg-type]


def outlive_terminal() -> None:
    """Keep this process running when its output cannot be written.

    This happens when the reader exits (`| head`), the disk is full, or the encoding lacks a character.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed before Python started
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8", errors="backslashreplace"))  # noqa: SIM115
            continue
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
        with contextlib.suppress(OSError, ValueError):  # the stream has no file descriptor
            handle = _Patient(stream.fileno(), "wb", closefd=False)
            text = io.TextIOWrapper(
                io.BufferedWriter(handle), stream.encoding, "backslashreplace", line_buffering=True, write_through=True
            )
            setattr(sys, name, text)
