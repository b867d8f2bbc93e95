"""README and docs/: links, names of options and files, the nav, and a page for every method."""

from __future__ import annotations

import fnmatch
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from docs.build import find_links, is_external, resolve
from docs.option_reference import PAGE, write_reference
from megatron_switchlora.config.facts import flatten
from megatron_switchlora.config.field_checks import field_types, fit, sections
from megatron_switchlora.config.method import METHODS
from tests.english import PATTERNS
from tests.pages import MARKERS, README, ROOT, anchors, blocks, code_words, pages, prose

TOP = "megatron_switchlora|launch|tools|tests|docs|benchmarks|ds_configs|examples"
LOG = ROOT / "docs" / "log.md"  # its options and files have the names of their time
SHARED = {"mhlora": "lte"}  # methods that share a page with another one


def test_the_readme_is_a_page() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 180


def rows(text: str) -> dict[str, list[str]]:
    """Return the rows of a page's tables by their first cell."""
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {cells[0]: cells[1:] for cells in found}


def test_the_readme_has_the_measured_results() -> None:
    """Trainable share, seeds, loss, gradient bytes and step time are those of the comparison."""
    measured = rows((ROOT / "benchmarks" / "compare_tiny_shakespeare.md").read_text(encoding="utf-8"))
    (results,) = re.findall(r"^## Results$(.*?)^## ", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    shown = {name: cells for name, cells in rows(results).items() if name in METHODS}
    assert len(shown) == len(METHODS)
    for name, (trainable, seeds, loss, gradients, time) in shown.items():
        _, share, _, runs, mean, _, sent, ratio, _ = measured[name]
        assert (trainable.replace(" %", "%"), seeds, loss) == (share, runs, mean)
        assert (gradients, time) == (sent.removesuffix(" (formula)"), ratio.partition(" ")[0])


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    links = [link for link in find_links(page.read_text(encoding="utf-8")) if not is_external(link)]
    broken = [link for link in links if not _exists(page, link)]
    assert not broken


def _exists(page: Path, link: str) -> bool:
    target, anchor = resolve(page, link), link.partition("#")[2]
    if not target.exists():
        return False
    return not anchor or anchor in anchors(target)


@pytest.mark.parametrize("page", [page for page in pages() if page != LOG], ids=lambda page: page.stem)
def test_options_exist(page: Path) -> None:
    """Flags with a dot, and names that begin with a section."""
    tops = "|".join(sorted(name for name in sections() if "." not in name))
    words = [word.strip(",;:()'\"[]{}") for word in code_words(page)]
    flags = [word.partition("=")[0][2:] for word in words if re.match(r"--[a-z_]+\.[a-z]", word)]
    names = [word.partition("=")[0] for word in words if re.fullmatch(rf"(?:{tops})\.[\w.*]+(=.*)?", word)]
    known = [*field_types(), *sections()]
    unknown = [name for name in flags + names if not fnmatch.filter(known, name) and not _is_module(name)]
    assert not unknown


def _is_module(name: str) -> bool:
    """Whether a name is a file, as `model.safetensors`, or a module's part, as `checkpoint.archive`."""
    path = ROOT / "megatron_switchlora" / name.replace(".", "/")
    return name.endswith((".py", ".safetensors", ".yaml", ".json")) or path.with_suffix(".py").exists()


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.stem)
def test_yaml_blocks_configure_a_run(page: Path) -> None:
    types = field_types()
    for block in blocks(page, "yaml"):
        if block.marker != "example":
            given: dict[str, Any] = flatten(yaml.safe_load(block.text), types)
            assert not given.keys() - types.keys()
            for name, value in given.items():
                fit(name, value, types[name])


@pytest.mark.parametrize("page", [page for page in pages() if page != LOG], ids=lambda page: page.stem)
def test_files_exist(page: Path) -> None:
    words = [word.strip(",;:()'\"[]{}").partition("::")[0] for word in code_words(page)]
    named = {word for word in words if re.fullmatch(rf"(?:{TOP})/[\w./*{{}},-]*", word)}
    scripts = {word for word in words if re.fullmatch(r"[\w/-]+/[\w-]+\.(?:py|sbatch|sh)", word)}
    roots = [ROOT, ROOT / "megatron_switchlora"]
    missing = {path for path in named | scripts if not any(list(root.glob(path)) for root in roots)}
    assert not missing


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.stem)
def test_markers_are_known(page: Path) -> None:
    markers = {block.marker for kind in ("bash", "yaml") for block in blocks(page, kind)}
    assert markers <= {"", *MARKERS}


@pytest.mark.parametrize("page", [page for page in pages() if page != PAGE], ids=lambda page: page.stem)
def test_pages_are_plain_english(page: Path) -> None:
    """The phrases that `make checks` finds in the code's prose; those of the option reference are the code's."""
    text = " ".join(prose(page).split())
    found = {match.group(): instead for phrase, instead in PATTERNS.items() for match in phrase.finditer(text)}
    assert not found


def nav_entries(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    values = nav.values() if isinstance(nav, dict) else nav
    return [entry for each in values for entry in nav_entries(each)]


def test_each_page_is_in_the_nav_once() -> None:
    nav = tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]["nav"]
    found = ["index.md", *(str(page.relative_to(ROOT / "docs")) for page in pages() if page != README)]
    assert sorted(nav_entries(nav)) == sorted(found)


def test_option_reference_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == write_reference(), "run python -m docs.option_reference"


@pytest.mark.parametrize("name", METHODS)
def test_each_method_has_a_page_and_an_overlay(name: str) -> None:
    page = ROOT / "docs" / "methods" / f"{SHARED.get(name, name)}.md"
    assert f"method.name {name}" in page.read_text(encoding="utf-8")
    for listing in (README, ROOT / "docs" / "methods" / "index.md"):
        assert f"`{name}`" in listing.read_text(encoding="utf-8")
    overlays = (ROOT / "launch" / "configs" / "methods").glob("*.yaml")
    assert name in {yaml.safe_load(path.read_text(encoding="utf-8"))["method"]["name"] for path in overlays}
