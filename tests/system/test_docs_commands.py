"""The commands of README and docs/ that no marker keeps from it run, page by page, as their reader types them.

Scripts are forked from a warm interpreter. `tests/unit/test_docs_commands.py` parses all commands.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.pages import ROOT, Command, blocks, commands, pages
from tests.system.commands import Place


def run_commands(page: Path) -> list[Command]:
    return [command for block in blocks(page, "bash") if not block.marker for command in commands(block)]


@pytest.mark.full
@pytest.mark.parametrize("page", [page for page in pages() if run_commands(page)], ids=lambda page: page.stem)
def test_commands_run(page: Path, tmp_path: Path) -> None:
    place = Place(tmp_path)
    for name in ("benchmarks", "docs", "ds_configs", "launch", "tools"):
        os.symlink(ROOT / name, tmp_path / name)
    switchlora = tmp_path / "switchlora.py"
    switchlora.write_text("from megatron_switchlora.cli.main import main\n\nmain()\n", encoding="utf-8")
    for command in run_commands(page):
        program, first, *words = command.words
        if program == "switchlora":
            script, words = str(switchlora), [first, *words]
        else:
            assert program == "python", "a marker says why another program is not run"
            script = first
        if "pretrain" in first:
            words += ["--train.device", "cpu", "--train.threads", "1"]
        status, output = place.script(script, *words)
        assert status == 0, f"{command}\n{output}"
