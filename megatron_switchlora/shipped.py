"""The files that come with the package: launch scripts, run configurations, DeepSpeed JSONs, settings of comparisons.

In a checkout they lie beside the package, where people look for them; an installed package holds them inside
(`setup.py` maps the folders).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Optional

PACKAGE = Path(__file__).resolve().parent
ROOT = PACKAGE.parent  # of the checkout, where it is one


def shipped_folder(name: str) -> Path:
    """Return the folder `launch`, `ds_configs` or `settings`."""
    inside = PACKAGE / name
    if inside.is_dir():
        return inside
    return PACKAGE.parent / {"settings": "tools/settings"}.get(name, name)


def given_or_shipped(path: Path, folder: str, suffix: str) -> Path:
    """Return `path`, or the shipped file that it names without folder and suffix, as `cpu_quickstart`.

    A file of the user's comes first.
    """
    if path.is_absolute() or ".." in path.parts or os.path.isfile(path):
        return path
    named = shipped_folder(folder.split("/")[0]).joinpath(*folder.split("/")[1:], f"{path}{suffix}")
    return named if os.path.isfile(named) else path  # unlike Path.is_file, no error where a name is too long


def checkout() -> Optional[Path]:
    """Return the folder of the checkout from which the package runs; None if it is installed."""
    return None if (PACKAGE / "launch").is_dir() else PACKAGE.parent


def home_path(text: str) -> Path:
    """Return the file that a setting of a comparison names: a shipped one, or one in the checkout or working folder."""
    parts = Path(text).parts
    if parts[:1] in (("launch",), ("ds_configs",)):
        return shipped_folder(parts[0]).joinpath(*parts[1:])
    return (checkout() or Path.cwd()) / text
