"""Check what DeepSpeed's monitors need of the machine, before a run writes anything.

They need packages and places to write. DeepSpeed writes on rank 0 alone, so only that rank's machine counts.
"""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from packaging.version import Version

from megatron_switchlora.config.errors import UserError, require

# The module that a section needs, its package, and the oldest version that DeepSpeed takes.
PACKAGES = {
    "tensorboard": ("tensorboard", "tensorboard", "0"), "wandb": ("wandb", "wandb", "0"),
    "comet": ("comet_ml", "comet-ml", "3.41.0"),
}  # fmt: skip


def check_monitors(ds_config: dict[str, Any]) -> str:
    """Check every monitor that the JSON enables; return "", for `on_one_rank`.

    Raises:
        UserError: a monitor's package is missing, or it could not write.
    """
    on = {name: section for name, section in ds_config.items() if isinstance(section, dict) and section.get("enabled")}
    for name in PACKAGES.keys() & on.keys():
        _require_package(name)
    for name in ("tensorboard", "csv_monitor"):
        if name in on:
            folder = Path(on[name].get("output_path", ""), on[name].get("job_name", "DeepSpeedJobName"))
            _require_writable(f"{name}.output_path", folder)
    profile = on.get("flops_profiler", {}).get("output_file")
    if profile is not None:
        _require_writable("flops_profiler.output_file", Path(profile).parent)
    return ""


def _require_package(section: str) -> None:
    module, package, oldest = PACKAGES[section]
    try:
        fits = find_spec(module) is not None and Version(version(package)) >= Version(oldest)
    except PackageNotFoundError:
        fits = False
    wanted = package if oldest == "0" else f"'{package}>={oldest}'"
    require(
        fits,
        f"The DeepSpeed JSON enables {section}, whose package is not installed: pip install {wanted}, or set "
        f"{section}.enabled to false.",
    )


def _require_writable(key: str, folder: Path) -> None:
    try:
        parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        fits = parent.is_dir() and os.access(parent, os.W_OK)
        if fits:  # always true for root: only an attempt shows what an NFS server or /proc refuses
            TemporaryDirectory(prefix=".probe-", dir=parent).cleanup()
    except OSError as error:
        raise UserError(
            f"{key} in the DeepSpeed JSON: {folder} cannot be made ({error.strerror}): change it."
        ) from None
    require(
        fits,
        f"{key} in the DeepSpeed JSON: {folder} cannot be made, since {parent} is not a folder that can be written: "
        "change it.",
    )
