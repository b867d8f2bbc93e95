"""A Hugging Face folder becomes the starting point of runs: a checkpoint of weights alone, with all that belongs to it.

The tokenizer's files go along as they are, and config.json's and generation_config.json's marks and settings of
generation in state.json, so that runs hand them on to their exports (`hf.joined_marks`). Of links, only those within
the model's own folder are followed; files that only their owner may read stay so.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from megatron_switchlora.checkpoint.archive import write_slices
from megatron_switchlora.checkpoint.files import build_folder, seal
from megatron_switchlora.config.errors import require
from megatron_switchlora.config.model import ModelConfig
from megatron_switchlora.config.plugins import load_plugins
from megatron_switchlora.data.hf_tokenizer import require_own, tokenizer_files
from megatron_switchlora.distributed.buckets import grouped
from megatron_switchlora.distributed.slices import TensorSlice
from megatron_switchlora.hf.adapter import is_adapter, read_adapter
from megatron_switchlora.hf.folders import MARKS, hf_names, hf_shapes
from megatron_switchlora.hf.import_ import hf_tensors, read_hf_config, read_object
from megatron_switchlora.model.protocol import build_on_meta


def import_model(
    source: Path, out: Path, limit: int = 1 << 30, base: Path | None = None, plugins: Sequence[str] = ()
) -> None:
    """Make a Hugging Face folder, or a LoRA's of PEFT over its base, the starting point of runs.

    Written are a checkpoint of weights alone, in files of about `limit` bytes, its tokenizer, if it has one, and
    model.yaml for --config. `plugins` may register the model's family, and go into both.

    Raises:
        UserError: as `read_hf_config`, `hf_tensors` and `read_adapter`; links out of the folder; `out` exists or cannot
            be written.
    """
    load_plugins(plugins)
    adapter = read_adapter(source, base) if is_adapter(source) else None
    require(adapter is not None or base is None, f"{source} is no adapter, so that it has no base: leave --base out.")
    whole = adapter.base if adapter else source
    config, vocab_size = read_hf_config(whole)
    tensors = hf_tensors(whole, config, vocab_size)  # refuses here, before anything is written
    if adapter:
        tensors = adapter.merged(tensors, hf_shapes(build_on_meta(config, vocab_size)))
    tensors = _by_our_names(config, vocab_size, tensors)
    imported = read_marks(whole)
    folders = [folder for folder in (source, whole) if tokenizer_files(folder)]
    if folders:
        require_own(folders[0], tokenizer_files(folders[0]))

    def fill(folder: Path) -> None:
        _write_tensors(tensors, folder, limit)
        model, registers = asdict(config), {"plugins": list(plugins)} if plugins else {}
        state = {"step": 0, "config": {"model": model, **registers}, "vocab_size": vocab_size}
        state["imported_from"] = str(source)
        (folder / "state.json").write_text(json.dumps({**state, "imported": imported}, indent=1), encoding="utf-8")
        given = {"model": {key: value for key, value in model.items() if value is not None}, **registers}
        (folder / "model.yaml").write_text(yaml.safe_dump(given, sort_keys=False), encoding="utf-8")
        if folders:
            copy_tokenizer(folders[0], folder / "tokenizer")
        seal(folder, 0)

    build_folder(out, fill)


def _by_our_names(
    config: ModelConfig, vocab_size: int, tensors: Iterator[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    ours = {hf_name: name for name, hf_name in hf_names(build_on_meta(config, vocab_size)).items()}
    return ((ours[name], tensor) for name, tensor in tensors)


def _write_tensors(tensors: Iterator[tuple[str, Tensor]], folder: Path, limit: int) -> None:
    slices = (TensorSlice(name, tuple(tensor.shape), (0,) * tensor.dim(), tensor, None) for name, tensor in tensors)
    for number, group in enumerate(grouped(slices, lambda held: held.tensor.nbytes, limit)):
        write_slices(folder / f"tensors-{number:05d}.safetensors", group)
        group.clear()  # before the next tensors are read


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy a tokenizer's files to a new folder, chat templates in folders of their own too; nothing becomes readable to
    more than it was."""
    folder.mkdir()
    for path in tokenizer_files(source):
        target = folder / path.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)
        target.chmod(target.stat().st_mode & path.stat().st_mode)


def read_marks(folder: Path) -> dict[str, Any]:
    """The marks that config.json names, and what generation_config.json holds, if there is one.

    Raises:
        UserError: a damaged file, or marks that are no tokens.
    """
    config, path = read_object(folder / "config.json"), folder / "generation_config.json"
    generation = read_object(path) if path.is_file() else {}
    for file, content in ((folder / "config.json", config), (path, generation)):
        for key in MARKS:
            value = content.get(key)
            listed = value if isinstance(value, list) and key == "eos_token_id" else [value]
            require(
                value is None or (len(listed) > 0 and all(type(each) is int for each in listed)),
                f"{file} must hold {key} as the number of a token, not {value!r}: correct it.",
            )
    return {**{key: config.get(key) for key in MARKS}, "generation": generation}
