"""Plugins: modules of the user's that register methods of their own.

They are named by the run option `plugins`, imported before anything else of a configuration is read, and kept with it:
resuming, evaluating and exporting import them again. A configuration may come from somebody else, so a module is only
imported if its source speaks of this package.
"""

from __future__ import annotations

import importlib
import importlib.machinery
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_switchlora.config.errors import UserError, require

PACKAGE = "megatron_switchlora"


def listed(given: Any) -> list[Any]:
    """Return the option's value, one name or several, as a list."""
    return list(given) if isinstance(given, (list, tuple)) else [given] if given else []


def load_plugins(names: Iterable[Any]) -> None:
    """Import the modules.

    Raises:
        UserError: one is missing, is no plugin, or fails as it is imported.
    """
    for name in names:
        valid = isinstance(name, str) and all(word.isidentifier() for word in name.split("."))
        require(valid, f"plugins holds {name!r}: give names of Python modules, as my_methods.sparse.")
        path = _find(name)
        require(
            path is not None and PACKAGE in path.read_text(encoding="utf-8", errors="replace"),
            f"plugins names {name}, which is no plugin: there is no such Python module on the path, or it does not "
            f"import {PACKAGE}. Correct the name, or add its folder to PYTHONPATH.",
        )
        try:
            importlib.import_module(name)
        except Exception as error:  # somebody else's code
            raise UserError(f"The plugin {name} fails as it is imported ({type(error).__name__}: {error}).") from error


def _find(name: str) -> Path | None:
    """Return a module's source file without importing it or a package around it."""
    folders: list[str] | None = None
    spec: importlib.machinery.ModuleSpec | None = None
    for end in range(1, name.count(".") + 2):
        part = ".".join(name.split(".")[:end])
        spec = importlib.machinery.PathFinder.find_spec(part, folders)
        if spec is None:
            return None
        folders = list(spec.submodule_search_locations or [])
    return Path(spec.origin) if spec and spec.origin and spec.origin.endswith(".py") else None
