"""The files that come with the package: launch scripts, run configurations, DeepSpeed JSONs, settings of comparisons.

In a checkout they lie beside the package, where people look for them; an installed package holds them inside
(`pyproject.toml` maps the folders).
"""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def shipped_folder(name: str) -> Path:
    """Return the folder `launch`, `ds_configs` or `settings`."""
    inside = PACKAGE / name
    if inside.is_dir():
        return inside
    return PACKAGE.parent / {"settings": "tools/settings"}.get(name, name)


def given_or_shipped(path: Path, folder: str, suffix: str) -> Path:
    """Return `path`, or the shipped file that it names without folder and suffix, as `cpu_quickstart`."""
    named = shipped_folder(folder.split("/")[0]).joinpath(*folder.split("/")[1:], f"{path}{suffix}")
    return named if named.is_file() and not path.exists() else path
