"""Facts of an option, stated where it is declared: may a resumed run change it, does it change results.

Lists of options are derived from these facts, never kept by hand; `tests/unit/test_facts.py` asks every option for its
own.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from dataclasses import MISSING, Field, field, fields, is_dataclass
from typing import Any, Literal, Union

Resume = Literal["free", "ask", "never"]


def option(
    default: Any = MISSING,
    *,
    resume: Resume = "never",
    results: bool = True,
    path: bool = False,
    swept: bool = False,
    basic: bool = False,
    factory: Union[Callable[[], Any], Any] = MISSING,
) -> Any:
    """Declare an option.

    Args:
        resume: whether a resumed run may change it: freely, if `checkpoint.allow_changes` names it, or never.
        results: whether it changes what a run computes, beyond rounding.
        path: whether it is a file or folder of the user's, in which ~ stands for the home folder.
        swept: whether a comparison of methods chooses it for each of its runs.
        basic: whether the short help shows it, as one of the options to start with.
    """
    metadata = {"resume": resume, "results": results, "path": path, "swept": swept, "basic": basic}
    return field(default=default, default_factory=factory, metadata=metadata)


def walk(section: Any, prefix: str = "") -> Iterator[tuple[str, Field[Any], Any]]:
    """Yield (dotted name, field, value) of every option below a section, an instance of a dataclass."""
    for each in fields(section):
        name, value = f"{prefix}{each.name}", getattr(section, each.name)
        if is_dataclass(value):
            yield from walk(value, f"{name}.")
        else:
            yield name, each, value


def names_where(section: Any, holds: Callable[[Any], bool]) -> list[str]:
    """Return the dotted names of the options below a section whose facts meet a condition."""
    return [name for name, each, _ in walk(section) if holds(each.metadata)]


def value_of(tree: dict[str, Any], name: str, default: Any = None) -> Any:
    """Return the value under a dotted name in nested sections that were read from a file."""
    for key in name.split("."):
        if not isinstance(tree, dict) or key not in tree:
            return default
        tree = tree[key]
    return tree


def flatten(tree: dict[str, Any], options: Container[str], prefix: str = "") -> dict[str, Any]:
    """Return nested sections that were read from a file, by dotted name.

    An option of `options` may hold a dictionary itself.
    """
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and name not in options:
            flat |= flatten(value, options, f"{name}.")
        else:
            flat[name] = value
    return flat
