"""Errors that users can cause."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator


class UserError(ValueError):
    """A mistake in the input; the message gives the rule, the values and what to change."""


def require(condition: bool, message: str) -> None:
    """Raise `UserError(message)` unless the condition holds."""
    if not condition:
        raise UserError(message)


@contextlib.contextmanager
def ends_on_mistake() -> Iterator[None]:
    """Print a UserError that is raised inside, and end this program, which has no other ranks, with status 2."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
