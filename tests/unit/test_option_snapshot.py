"""Options are public: their names, types and defaults are those of options.txt (docs/stability.md).

After a change on purpose, `python -m tests.unit.test_option_snapshot` writes the file again.
"""

from __future__ import annotations

import json
from pathlib import Path

import megatron_switchlora.methods  # noqa: F401  # registers them
from megatron_switchlora.config.facts import walk
from megatron_switchlora.config.method import METHODS
from megatron_switchlora.config.run import run_config_class

SNAPSHOT = Path(__file__).with_name("options.txt")


def listed_options() -> str:
    """Return a line per option of the package, `name type default`; those of plugins are left out."""
    packaged = {name for facts in METHODS.values() if _is_packaged(facts) for name in facts.sections}
    foreign = {name for facts in METHODS.values() for name in facts.sections} - packaged
    lines = []
    for name, option, default in walk(run_config_class()()):
        if name.removeprefix("method.").partition(".")[0] not in foreign:
            lines.append(f"{name} {str(option.type).replace(' ', '')} {json.dumps(default)}")
    return "\n".join(lines) + "\n"


def _is_packaged(facts: type) -> bool:
    return facts.__module__.startswith("megatron_switchlora.")


def test_options_are_those_of_the_snapshot() -> None:
    known, present = set(SNAPSHOT.read_text().splitlines()), set(listed_options().splitlines())
    changed = sorted(known ^ present)
    assert not changed, "run python -m tests.unit.test_option_snapshot, and add a line to CHANGELOG.md"


def test_the_snapshot_names_every_option_once() -> None:
    names = [line.split(" ")[0] for line in SNAPSHOT.read_text().splitlines()]
    assert len(names) == len(set(names)) > 80
    assert all(len(line.split(" ", 2)) == 3 for line in SNAPSHOT.read_text().splitlines())


if __name__ == "__main__":
    SNAPSHOT.write_text(listed_options())
