"""Generated parts of the documentation's pages: tables of results and what commands print.

Such a part stands between two comments, `<!-- generated: NAME -->` and `<!-- end of generated -->`.
"""

from __future__ import annotations

import re

from megatron_switchlora.study.documents.outputs import OUTPUTS
from megatron_switchlora.study.documents.tables import TABLES

BLOCK = re.compile(r"(<!-- generated: ([a-z0-9-]+) -->\n).*?(<!-- end of generated -->)", re.DOTALL)
GENERATED = TABLES | OUTPUTS


def fill(text: str) -> str:
    """Return a page with its generated parts as they are today.

    Raises:
        KeyError: the page names a part that does not exist.
    """
    return BLOCK.sub(lambda found: f"{found[1]}\n{GENERATED[found[2]]()}\n\n{found[3]}", text)


def names_in(text: str) -> list[str]:
    """Return the names of the generated parts of a page."""
    return [found[1] for found in BLOCK.findall(text)]
