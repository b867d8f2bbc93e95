"""Generated parts of the documentation are those of today's data and code; the figure shows modules that exist."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from megatron_switchlora.study.documents.pages import GENERATED, fill, names_in
from megatron_switchlora.study.documents.step_figure import PATH, REPEATED, STEPS
from tests.pages import ROOT, pages
from tests.unit.test_structure import PACKAGE, ROOMS

COMMAND = "run python -m megatron_switchlora.study.documents.command"
GENERATING = [page for page in pages() if names_in(page.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("page", GENERATING, ids=lambda page: page.stem)
def test_generated_parts_are_current(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert fill(text) == text, COMMAND


def test_each_generated_part_has_one_place() -> None:
    named = [name for page in pages() for name in names_in(page.read_text(encoding="utf-8"))]
    assert sorted(named) == sorted(GENERATED)


def test_the_modules_of_the_figure_exist() -> None:
    missing = [name for step in STEPS for name in step.modules if not (ROOT / PACKAGE / name).is_file()]
    assert not missing


def test_the_committed_figure_shows_the_steps_in_order() -> None:
    nodes = ElementTree.parse(PATH).iter("{http://www.w3.org/2000/svg}text")
    shown = " ".join(" ".join("".join(node.itertext()) for node in nodes).split())
    assert REPEATED in shown
    for step in STEPS:
        for text in (step.title, *step.modules, *step.crosses.split("\n")):
            assert text in shown, COMMAND
    places = [shown.index(step.title) for step in STEPS]
    assert places == sorted(places)


def test_the_rooms_of_the_architecture_page_are_those_of_the_package() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = re.findall(r"^\| `(\w+)(?:/|\.py)` \|", text, re.MULTILINE)
    assert tuple(named) == ROOMS
