"""Decide whether a configuration may resume from a checkpoint, and report differences with both values.

The configuration must equal the checkpoint's, except for options whose own facts allow a change on resume. Some may
change freely, others only if `checkpoint.allow_changes` lists them.
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import asdict
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from typing import Any, Optional

import torch

from megatron_switchlora.config.errors import UserError
from megatron_switchlora.config.facts import names_where, value_of, walk
from megatron_switchlora.config.rules import changeable_options, unread_options
from megatron_switchlora.config.run import RunConfig, run_config_class
from megatron_switchlora.startup.device import gpu_identity


def what_must_agree(config: RunConfig, ds_config: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Return what must be the same on all ranks: options, DeepSpeed's JSON, versions and code."""
    code = hashlib.sha256()
    package = Path(__file__).parents[1]
    for path in sorted(path for path in package.rglob("*.py") if path.is_file()):
        code.update(f"{path.relative_to(package)}\n".encode() + path.read_bytes())
    script = getattr(sys.modules["__main__"], "__file__", None)  # launch/pretrain.py
    if script and Path(script).is_file():
        code.update(Path(script).read_bytes())
    same = {"device": device.type, "ds_config": ds_config, "the code's digest": code.hexdigest()[:12]}
    same |= {f"version of {name}": version(name) for name in ("torch", "deepspeed", "numpy")}
    return {name: value for name, _, value in walk(config)} | same | gpu_identity(device)


def compare(config: RunConfig, stored: dict[str, Any], what: str) -> None:
    """Compare the configuration with a stored one; `what` describes the latter in messages.

    Raises:
        UserError: they differ in an option that must not change; the message gives both values.
    """
    configured = {name: value for name, _, value in walk(config)}
    saved = {name: value_of(stored, name, default) for name, _, default in walk(run_config_class()())}
    free = names_where(config, lambda facts: facts["resume"] == "free")
    allowed = [*free, *config.checkpoint.allow_changes, *config.method.facts.may_change]
    if configured["method.name"] == saved["method.name"]:
        allowed += unread_options(config.method)
    if all(_dense_follows(config, side) for side in (configured, saved)):
        allowed += ["optim.dense_lr"]
    _refuse_thawing(config, saved["optim.dense_lr"], what)
    names = [name for name in configured if configured[name] != saved[name] and not _matches(name, allowed)]
    if not names:
        return
    listed = "; ".join(f"{name} is {saved[name]!r} there and {configured[name]!r} here" for name in names[:5])
    more = f" (and {len(names) - 5} more)" if len(names) > 5 else ""
    changeable = [name for name in names if name in changeable_options(config)]
    advice = (
        f" To use the new values, add --checkpoint.allow_changes '{json.dumps(changeable)}'."
        if changeable == names
        else ""
    )
    raise UserError(
        f"{what} has another configuration: {listed}{more}. Give its values, or another --output_dir for a new "
        f"run.{advice}"
    )


def _refuse_thawing(config: RunConfig, stored: Optional[float], what: str) -> None:
    """Refuse to train dense tensors that were frozen, or the reverse, since only trained ones have moments.

    Raises:
        UserError: only one of `stored` and `optim.dense_lr` is 0.
    """
    given = config.optim.dense_lr
    if (stored == 0) != (given == 0):
        raise UserError(
            f"{what} has another configuration: optim.dense_lr is {stored!r} there and {given!r} here, and 0 freezes "
            "embedding, output layer and norms, which then have no moments: give its value, or start a new run from it "
            "with --train.init_from."
        )


def _dense_follows(config: RunConfig, options: dict[str, Any]) -> bool:
    """Return whether the dense tensors' rate is the method's default for `optim.lr`, which is compared itself."""
    lr, dense_lr = options["optim.lr"], options["optim.dense_lr"]
    return dense_lr is None or (lr is not None and dense_lr == config.method.facts.default_dense_lr(lr))


def compare_data(config: RunConfig, state: dict[str, Any], here: dict[str, Any]) -> None:
    """Compare a checkpoint's text, tokenizer and vocabulary with this run's, which are `here`.

    Raises:
        UserError: they differ.
    """
    allowed = "data" in config.checkpoint.allow_changes
    different = [key for key in here if state.get(key) != here[key] and not (allowed and key == "data")]
    if not different:
        return
    configured, saved = asdict(config)["data"], state["config"].get("data", {})
    named = [f"data.{k} is {saved.get(k)!r} there and {v!r} here" for k, v in configured.items() if saved.get(k) != v]
    raise UserError(
        "The checkpoint's run read other text or another tokenizer: "
        + "; ".join(f"{key} is {str(state.get(key))[:20]} there and {str(here[key])[:20]} here" for key in different)
        + f" ({'; '.join(named) or 'the options are the same, so the files have changed'}). Give the same text and "
        "tokenizer, or --checkpoint.allow_changes '[\"data\"]' for another text with the same tokenizer."
    )


def _matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)
