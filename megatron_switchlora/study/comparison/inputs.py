"""What a batch needs beside the code where the text is not: one folder with the setting, the tokens, and what they are.

DIR/NAME.yaml    the setting
DIR/cache/       the token cache's folder (data/packing.py)
DIR/inputs.json  the options of the text, the revision and the digest of the code
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import torch

import megatron_switchlora.data.cache as cache
from megatron_switchlora.checkpoint.files import replace_folder
from megatron_switchlora.checkpoint.resume_rules import what_must_agree
from megatron_switchlora.config.errors import UserError, require
from megatron_switchlora.config.run import RunConfig
from megatron_switchlora.data.packing import open_prepared, prepare
from megatron_switchlora.disk import read_json
from megatron_switchlora.run.machine import versions
from megatron_switchlora.study.comparison.settings import Setting, counted_options
from megatron_switchlora.train.dataset import data_identity

LARGEST = 64 << 20  # bytes of a folder of inputs


@dataclass(frozen=True)
class Inputs:
    """The tokens that all runs of a batch read: their cache folder and fingerprint.

    `revision` is the code's, where only the inputs know it.
    """

    cache: Path
    text: str
    revision: Optional[str] = None


def text_options(setting: Setting) -> dict[str, Any]:
    """Return the options that choose the text, which all selected methods must have alike.

    Raises:
        UserError: two differ.
    """
    chosen = {}
    for name in setting.selected:
        options = setting.run_options(name, setting.methods[name].starts()[0], 0, False)
        chosen[name] = {key: value for key, value in counted_options(options).items() if key.startswith("data.")}
    first = setting.selected[0]
    for name, options in chosen.items():
        require(
            options == chosen[first],
            f"All runs of a batch read one text, but the options data.* of {name} and {first} differ: leave one out "
            "with --methods.",
        )
    return chosen[first]


def prepare_inputs(config: RunConfig) -> Inputs:
    """Return the tokens of a text that is here, prepared if they are not yet."""
    data = prepare(config.data, progress=True)
    for note in data.notes:
        print(f"warning: {note}", flush=True)
    return Inputs(data.folder, fingerprint(data.folder))


def fingerprint(folder: Path) -> str:
    """Return the mark of a cache's tokens, as a run's meta.json holds it."""
    data = open_prepared(folder)
    return str(data_identity(data, data.vocab_size)["data"])


def code_digest(config: RunConfig) -> str:
    """Return the digest of the code that a start compares between its ranks."""
    return str(what_must_agree(config, {}, torch.device("cpu"))["the code's digest"])


def pack(setting: Setting, source: Path, config: RunConfig, folder: Path) -> int:
    """Write all that a batch needs into a folder, and return its bytes; `source` is the setting's file.

    Raises:
        UserError: it would be larger than `LARGEST`, or there is another folder in its place.
    """
    require(
        not folder.exists() or (folder / "inputs.json").is_file(),
        f"{folder} is there and holds no earlier inputs, so it is not replaced: give --pack another folder.",
    )
    options, prepared = text_options(setting), prepare_inputs(config)
    content = {"data": options, "revision": versions()["git_revision"], "code": code_digest(config)}
    files = [path for path in [source, *prepared.cache.rglob("*")] if path.is_file()]
    size = sum(path.stat().st_size for path in files) + len(json.dumps(content))
    require(
        size <= LARGEST,
        f"Inputs may have {LARGEST >> 20} MiB, but the tokens of this text have {size / 2**20:.1f} MiB: give fewer "
        "files or a shorter text.",
    )

    def fill(building: Path) -> None:
        shutil.copytree(prepared.cache, building / "cache")
        shutil.copyfile(source, building / f"{setting.name}.yaml")
        (building / "inputs.json").write_text(json.dumps(content), encoding="utf-8")

    replace_folder(folder, fill)
    return size


def open_inputs(folder: Path, setting: Setting, config: RunConfig) -> Inputs:
    """Return the tokens of a packed folder, each file compared with its sum.

    Raises:
        UserError: the folder is damaged, or was packed for another text or by other code.
    """
    try:
        content = read_json(folder / "inputs.json")
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} holds no inputs ({error}): make them with --pack.") from None
    damage = cache.fault(folder / "cache")
    require(damage is None, f"The tokens in {folder} are damaged ({damage}): pack and carry them again.")
    options, digest = text_options(setting), code_digest(config)
    require(
        isinstance(content, dict) and content.get("data") == options,
        f"{folder} was packed for another text than the setting's ({options}): pack it again.",
    )
    require(
        content.get("code") == digest,
        f"{folder} was packed by code of digest {content.get('code')}, this code has {digest}: carry the same code, or "
        "pack again.",
    )
    return Inputs(folder / "cache", fingerprint(folder / "cache"), content.get("revision"))
