"""Print rank 0's progress, as a decoration whose failure does not stop the run."""

from __future__ import annotations

from typing import Any, Optional

from tqdm import tqdm

from megatron_switchlora.run.figures import decorating


class Terminal:
    """Lines on standard output and, on a terminal, a progress bar; silent unless `prints`."""

    def __init__(self, prints: bool) -> None:
        self.prints = prints
        self._bar: Optional[tqdm] = None

    def print_line(self, text: str) -> None:
        if self.prints:
            with decorating("writing to the terminal"):
                tqdm.write(text)

    def begin(self, steps: int) -> None:
        if self.prints:
            with decorating("the progress bar"):
                self._bar = tqdm(total=steps, unit="step", disable=None, dynamic_ncols=True)

    def end(self) -> None:
        if self._bar is not None:
            with decorating("the progress bar"):
                self._bar.close()

    def show(self, record: dict[str, Any], last_step: int) -> None:
        """Print one readable line per step, or show it at the end of the bar."""
        if self.prints:
            with decorating("writing to the terminal"):
                self._show(record, last_step)

    def _show(self, record: dict[str, Any], last_step: int) -> None:
        line = (
            f"loss {record['loss']:.4f}  norm {record['grad_norm']:.3f}  lr {record['lr']:.2e}  "
            f"{record['tokens_per_second']:,.0f} tok/s  switched {record['switched']}"
        )
        if self._bar is None or self._bar.disable:
            print(f"step {record['step']:>6}/{last_step}  {line}", flush=True)
        else:
            self._bar.set_postfix_str(line, refresh=False)
            self._bar.update()
