"""Guards name tests that exist, and give way to them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.dist.launch import REPOSITORY, clean_environment, run_scripts
from tests.selection import is_form

pytest_plugins = ["pytester"]
COLLECT = """
import sys, pytest
from tests.selection import named_form

class Names:
    def pytest_collection_modifyitems(self, items):
        for item in items:
            print("NAMED" if named_form(item) else "FOUND", named_form(item) or item.nodeid)

sys.exit(pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", *sys.argv[1:]], plugins=[Names()]))
"""


def test_every_guard_names_a_test(tmp_path: Path) -> None:
    script = tmp_path / "collect.py"
    script.write_text(COLLECT)
    files = [str(path) for path in REPOSITORY.glob("tests/*/test_*.py") if "guard_of(" in path.read_text()]
    files.remove(__file__)
    (status,), output = run_scripts(script, files, [clean_environment(tmp_path)], REPOSITORY, timeout=120)
    assert status == 0, output
    lines = [line.split(" ", 1) for line in output.splitlines() if line.startswith(("NAMED ", "FOUND "))]
    found = [name for kind, name in lines if kind == "FOUND"]
    named = {name for kind, name in lines if kind == "NAMED"}
    assert named and found
    assert not [name for name in named if not any(is_form(nodeid, name) for nodeid in found)]


@pytest.mark.parametrize(
    ("nodeid", "name", "same"),
    [
        ("a.py::test_x", "a.py::test_x", True),
        ("a.py::test_x[20-full]", "a.py::test_x[20]", True),
        ("a.py::test_x[20-full]", "a.py::test_x", True),
        ("a.py::test_x[120-full]", "a.py::test_x[20]", False),
        ("a.py::test_x_y", "a.py::test_x", False),
        ("b.py::test_x", "a.py::test_x", False),
    ],
)
def test_a_name_means_one_function_and_perhaps_one_case(nodeid: str, name: str, same: bool) -> None:
    assert is_form(nodeid, name) == same


SUITE = """
import pytest

@pytest.mark.parametrize("steps", [pytest.param(9, marks=pytest.mark.guard_of("test_it.py::{test}[20]")),
                                   pytest.param(20, marks=pytest.mark.full)])
def test_losses(steps):
    pass

@pytest.mark.guard_of("test_it.py::test_wide")
def test_narrow():
    pass

@pytest.mark.full
def test_wide():
    pass
"""


@pytest.mark.parametrize(
    ("words", "ran"),
    [
        (["-m", "not full"], ["test_losses[9]", "test_narrow"]),
        (["-n", "2"], ["test_losses[20]", "test_wide"]),
    ],
)
def test_a_guard_runs_only_without_its_larger_form(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, words: list[str], ran: list[str]
) -> None:
    pytester.makeini("[pytest]\nmarkers =\n  full: a\n  guard_of(name): b\n")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    pytester.makepyfile(test_it=SUITE)
    result = pytester.runpytest_subprocess("-v", "-p", "tests.selection", *words)
    result.assert_outcomes(passed=2)
    text = result.stdout.str()
    assert all(f"::{name}" in text for name in ran), text
