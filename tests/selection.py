"""Which tests run: a guard is a short form of a test, for every day.

`@pytest.mark.guard_of("tests/dist/test_x.py::test_long[case]")`: it is deselected where its larger form is selected.
`{test}` stands for the guard's own function. What stands in brackets is one part of the larger form's id.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pytest


def named_form(item: pytest.Item) -> str | None:
    """Return the name of a guard's larger form, None for other tests."""
    marker = item.get_closest_marker("guard_of")
    return marker.args[0].format(test=getattr(item, "originalname", item.name)) if marker else None


def is_form(nodeid: str, name: str) -> bool:
    """Return whether the name means this test: its function, and in brackets one part of its id."""
    function, _, given = nodeid.removesuffix("]").partition("[")
    wanted, _, part = name.removesuffix("]").partition("[")
    return function == wanted and (not part or part in given.split("-"))


def guards_to_drop(items: Iterable[pytest.Item]) -> list[pytest.Item]:
    """Return the guards whose larger form is among the tests."""
    items = list(items)
    named = [(item, name) for item in items if (name := named_form(item))]
    return [item for item, name in named if any(is_form(other.nodeid, name) for other in items if other is not item)]


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Iterator[None]:
    """Deselect guards whose larger form is among what -m and -k leave."""
    yield
    dropped = guards_to_drop(items)
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if item not in dropped]
