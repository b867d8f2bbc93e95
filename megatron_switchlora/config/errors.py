"""The error that people can cause."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in the input: the message gives the rule, the values and what to change."""


def require(condition: bool, message: str) -> None:
    """Raise `UserError(message)` unless the condition holds."""
    if not condition:
        raise UserError(message)
