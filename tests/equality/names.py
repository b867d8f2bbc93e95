"""Option names of today and of earlier commits: one case is given to both in their own words."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

# Name today: name before. A commit that does not know the first is given the second.
RENAMED: dict[str, str] = {}


def words_for(options: dict[str, Any], known: Iterable[str]) -> list[str]:
    """Return the command line words of options (in today's names) for a commit that knows the options `known`."""
    names = set(known)
    translated = {name if name in names else RENAMED.get(name, name): value for name, value in options.items()}
    unknown = sorted(set(translated) - names)
    assert not unknown, f"the commit does not know {unknown}: complete RENAMED in tests/equality/names.py"
    return [f"--{name}={_word(value)}" for name, value in translated.items()]


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
