"""The table of model families, and what a configuration's rules ask of one.

This module knows no family. The package `model` fills the table at import, plugins add to it, and entry points import
both before they parse.
"""

from __future__ import annotations

from typing import ClassVar

from megatron_switchlora.config.errors import require
from megatron_switchlora.config.model import ModelConfig, check_shape
from megatron_switchlora.config.run import RunConfig


class FamilyRules:
    """The part of a family that needs no model; `model.protocol.Family` has the rest. Every family registers one."""

    name: ClassVar[str]
    """Its value of `model.family`."""
    title: ClassVar[str]
    """Its name in texts."""
    unread: ClassVar[frozenset[str]] = frozenset()
    """Options below `model` that it does not read."""

    def check(self, model: ModelConfig) -> None:
        """Check this family's rules of the model, beside those of `config.model.check_shape`.

        Raises:
            UserError: with the rule, the values and what to change.
        """

    def check_run(self, config: RunConfig) -> None:
        """Check that the model fits the rest of the run, such as `parallel.tp`.

        Raises:
            UserError: it does not.
        """


FAMILIES: dict[str, FamilyRules] = {}  # filled at import, as config.method.METHODS


def register_family(kind: type[FamilyRules]) -> type[FamilyRules]:
    """Add a family to the table; a decorator for its class."""
    FAMILIES[kind.name] = kind()
    return kind


def find_family(name: str) -> FamilyRules:
    """Return a family by its name.

    Raises:
        UserError: there is none.
    """
    require(
        name in FAMILIES,
        f"model.family must be one of {', '.join(FAMILIES)}, not {name!r}: choose one of them, or name the module that "
        "registers it with plugins.",
    )
    return FAMILIES[name]


def check_model(m: ModelConfig) -> None:
    """Check every rule of the model alone: those of all families, then those of its own family.

    Raises:
        UserError: with the rule, the values and what to change.
    """
    check_shape(m)
    find_family(m.family).check(m)
