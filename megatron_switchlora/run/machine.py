"""Describe the machine and the versions of the code with which a result was computed."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Optional


def machine() -> dict[str, Any]:
    """Return the processor's name, the number of CPUs, and the system's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    processor = names[0] if names else platform.processor() or platform.machine()
    return {"processor": processor, "cpus": os.cpu_count(), "system": platform.platform()}


def _git(*arguments: str) -> Optional[str]:
    """Return git's answer for the tree that holds this package, or None if there is none."""
    try:
        completed = subprocess.run(
            ["git", "--no-optional-locks", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True,
            timeout=10, check=True,
        )  # fmt: skip
    except (OSError, ValueError, subprocess.SubprocessError):  # ValueError: the answer is not UTF-8
        return None
    return completed.stdout.strip()


def _revision() -> Optional[str]:
    """Return the revision of the package's own tree, or None where git's tree is one that it is installed into."""
    top = _git("rev-parse", "--show-toplevel")
    if not top or Path(top).resolve() != Path(__file__).resolve().parents[2]:
        return None
    revision = _git("rev-parse", "HEAD")
    return revision and revision + ("-changed" if _git("status", "--porcelain", "-uno") else "")


def versions() -> dict[str, Optional[str]]:
    """Return the versions of Python and packages, and the git revision, with a mark if the tree is changed."""
    by_package: dict[str, Optional[str]] = {"python": platform.python_version(), "platform": platform.platform()}
    for package in ("megatron_switchlora", "torch", "deepspeed", "transformers", "datasets", "tokenizers", "numpy"):
        try:
            by_package[package] = version(package)
        except PackageNotFoundError:
            by_package[package] = None
    by_package["git_revision"] = _revision()
    return by_package
