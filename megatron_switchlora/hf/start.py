"""Turn a Hugging Face folder into the starting point of runs: a checkpoint that holds only weights.

The tokenizer's files are copied unchanged. State.json holds the marks of config.json and the settings of
generation_config.json, which runs pass on to their exports (`hf.folders.joined_marks`). Only links within the model's
own folder are followed. Files that only their owner may read stay private.
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
from megatron_switchlora.startup.progress import progress


def import_model(
    source: Path, out: Path, limit: int = 1 << 30, base: Path | None = None, plugins: Sequence[str] = ()
) -> None:
    """Make a Hugging Face folder, or a LoRA folder of PEFT merged into its base, the starting point of runs.

    It writes a checkpoint that holds only weights, in files of about `limit` bytes. With it come the tokenizer, if
    there is one, and model.yaml for --config. `plugins` may register the model's family; both files list them.

    Raises:
        UserError: as `read_hf_config`, `hf_tensors` and `read_adapter`; or a link leads out of the folder; or `out`
            exists or cannot be written.
    """
    load_plugins(plugins)
    adapter = read_adapter(source, base) if is_adapter(source) else None
    require(adapter is not None or base is None, f"{source} is not an adapter, so it has no base: leave --base out.")
    model_folder = adapter.base if adapter else source
    config, vocab_size = read_hf_config(model_folder)
    tensors = hf_tensors(model_folder, config, vocab_size)  # raises here, before anything is written
    if adapter:
        tensors = adapter.merged(tensors, hf_shapes(build_on_meta(config, vocab_size)))
    tensors = _by_our_names(config, vocab_size, tensors)
    imported = read_marks(model_folder)
    folders = [folder for folder in (source, model_folder) if tokenizer_files(folder)]
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
    return ((ours[name], tensor) for name, tensor in progress(tensors, "Importing", "tensors", len(ours)))


def _write_tensors(tensors: Iterator[tuple[str, Tensor]], folder: Path, limit: int) -> None:
    slices = (TensorSlice(name, tuple(tensor.shape), (0,) * tensor.dim(), tensor, None) for name, tensor in tensors)
    for number, group in enumerate(grouped(slices, lambda held: held.tensor.nbytes, limit)):
        write_slices(folder / f"tensors-{number:05d}.safetensors", group)
        group.clear()  # before the next tensors are read


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy a tokenizer's files to a new folder, including a folder of chat templates.

    A copy is readable by nobody who could not read the original.
    """
    folder.mkdir()
    for path in tokenizer_files(source):
        target = folder / path.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)
        target.chmod(target.stat().st_mode & path.stat().st_mode)


def read_marks(folder: Path) -> dict[str, Any]:
    """Read the marks in config.json, and the content of generation_config.json if there is one.

    Raises:
        UserError: a file is damaged, or a mark is not a token id.
    """
    config, path = read_object(folder / "config.json"), folder / "generation_config.json"
    generation = read_object(path) if path.is_file() else {}
    for file, content in ((folder / "config.json", config), (path, generation)):
        for key in MARKS:
            value = content.get(key)
            listed = value if isinstance(value, list) and key == "eos_token_id" else [value]
            require(
                value is None or (len(listed) > 0 and all(type(each) is int for each in listed)),
                f"{file} must hold {key} as a token id, not {value!r}: correct it.",
            )
    return {**{key: config.get(key) for key in MARKS}, "generation": generation}
