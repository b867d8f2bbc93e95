"""Write the generated parts of the documentation.

    python -m megatron_switchlora.study.documents.command

Tables come from benchmarks/*.json (`tables.py`), output from commands (`outputs.py`), the figure of a training step
from its list of modules (`step_figure.py`). Only pages that change are written.
"""

from __future__ import annotations

import megatron_switchlora.methods  # noqa: F401  # registers them
from megatron_switchlora.disk import replace_text
from megatron_switchlora.shipped import ROOT
from megatron_switchlora.study.documents.pages import fill, names_in
from megatron_switchlora.study.documents.step_figure import draw


def main() -> None:
    for page in sorted((ROOT / "docs").rglob("*.md")):
        text = page.read_text(encoding="utf-8")
        filled = fill(text)
        if filled != text:
            replace_text(page, filled)
            print(f"{page.relative_to(ROOT)}: {', '.join(names_in(text))}")
    draw()


if __name__ == "__main__":
    main()
