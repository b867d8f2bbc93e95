"""Plugins: modules of the user's that register methods or model families of their own.

The run option `plugins` names them. They are imported before anything else of a configuration is read. The option is
kept with the configuration, so resuming, evaluating and exporting import them again.

A configuration may come from somebody else. So a module is only imported if its source mentions this package. It is
never imported if it came along with the run or checkpoint that names it.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_switchlora.config.errors import UserError, require

PACKAGE = "megatron_switchlora"


def listed(given: Any) -> list[Any]:
    """Return the option's value, one name or several, as a list."""
    return list(given) if isinstance(given, (list, tuple)) else [given] if given else []


def load_plugins(names: Iterable[Any], kept_in: Path | None = None) -> None:
    """Import the modules that a user names, or those of a configuration kept in a run's or checkpoint's folder.

    Raises:
        UserError: a module is missing, is no plugin, came along with that folder, or fails at import.
    """
    for name in names:
        valid = isinstance(name, str) and all(word.isidentifier() for word in name.split("."))
        require(valid, f"plugins holds {name!r}: give names of Python modules, as my_methods.sparse.")
        path = _find(name)
        if path is None or PACKAGE not in _source(name, path):
            raise UserError(
                f"plugins names {name}, which is no plugin: there is no such Python module on the path, or it does not "
                f"import {PACKAGE}. Correct the name, or add its folder to PYTHONPATH."
            )
        require(
            kept_in is None or name in sys.modules or not _came_along(name, path, kept_in),
            f"{kept_in} names the plugin {name}, which came along with it ({path}): its code is not run. If you trust "
            "it, move it to a folder of your own on PYTHONPATH.",
        )
        try:
            importlib.import_module(name)
        except (Exception, SystemExit) as error:  # foreign code
            raise UserError(f"The plugin {name} fails at import ({type(error).__name__}: {error}).") from error


def _find(name: str) -> Path | None:
    """Return a module's source file without importing it or a package around it."""
    folders: list[str] | None = None
    spec: importlib.machinery.ModuleSpec | None = None
    for end in range(1, name.count(".") + 2):
        qualified = ".".join(name.split(".")[:end])
        spec = importlib.machinery.PathFinder.find_spec(qualified, folders)
        if spec is None:
            return None
        folders = list(spec.submodule_search_locations or [])
    return Path(spec.origin) if spec and spec.origin and spec.origin.endswith(".py") else None


def _source(name: str, path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"The plugin {name} cannot be read: {error.strerror} ({path}). Give access to it.") from None


def _came_along(name: str, path: Path, folder: Path) -> bool:
    """Return whether a module lies in the folder, or the folder in the module's outermost package."""
    depth = name.count(".") + (path.name == "__init__.py")
    outermost = path.parents[depth] / name.split(".")[0]
    return path.resolve().is_relative_to(folder.resolve()) or folder.resolve().is_relative_to(outermost.resolve())
