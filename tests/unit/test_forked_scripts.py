"""Scripts run from the warm interpreter have the package that stands beside them."""

from __future__ import annotations

from pathlib import Path

from tests.dist.launch import clean_environment, run_scripts

SCRIPT = """
import sys
import megatron_switchlora
print(megatron_switchlora.__file__, [name for name in sys.modules if name.startswith("megatron_switchlora.")])
"""


def test_another_trees_script_has_its_own_package(tmp_path: Path) -> None:
    """Not what the interpreter has imported before: else comparing two commits would compare one with itself."""
    for folder in ("launch", "megatron_switchlora"):
        (tmp_path / folder).mkdir()
    (tmp_path / "megatron_switchlora" / "__init__.py").touch()
    script = tmp_path / "launch" / "show.py"
    script.write_text(SCRIPT)
    (status,), output = run_scripts(script, [], [clean_environment(tmp_path)], tmp_path, timeout=60)
    assert (status, output) == (0, f"{tmp_path}/megatron_switchlora/__init__.py []\n")
