"""Check what loggers need of the machine, before a run writes anything.

They need packages, and DeepSpeed's profiler a place to write. Rank 0 alone logs, so only its machine counts.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from megatron_switchlora.config.errors import UserError, require
from megatron_switchlora.config.log import LogConfig


def check_loggers(log: LogConfig, ds_config: dict[str, Any]) -> str:
    """Check every logger that the options choose; return "", for `on_one_rank`.

    Raises:
        UserError: a logger's package is missing, or DeepSpeed's profiler could not write.
    """
    require(
        log.wandb == "none" or find_spec("wandb") is not None,
        f"log.wandb {log.wandb} needs the package wandb, which is not installed: pip install "
        "'megatron_switchlora[wandb]' (or pip install wandb), or set log.wandb to none.",
    )
    require(
        not log.tensorboard or find_spec("tensorboard") is not None,
        "log.tensorboard needs the package tensorboard, which is not installed: pip install tensorboard, or set "
        "log.tensorboard to false.",
    )
    profile = ds_config.get("flops_profiler", {}).get("output_file")
    if profile is not None and ds_config["flops_profiler"].get("enabled"):
        _require_writable("flops_profiler.output_file", Path(profile).parent)
    return ""


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
