"""Run one case with the code of one tree, and return everything that must not change as digests and numbers.

Words may change between two commits, so of what is printed only the numbers count. Tensors are compared by the
digests of their bytes, records without what the clock says.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open

from tests.dist.launch import clean_environment, free_port, run_scripts
from tests.equality.cases import options_of, world_of
from tests.equality.covering import Row
from tests.equality.names import words_for

OF_THE_CLOCK = {"seconds", "tokens_per_second", "peak_memory_bytes"}
NUMBER = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")
Observed = dict[str, Any]


@dataclass(frozen=True)
class Tree:
    """A checkout; `known` are the names of its options."""

    root: Path
    known: frozenset[str] = frozenset()


def numbers(text: str) -> list[str]:
    return NUMBER.findall(text)


def open_tree(root: Path, scratch: Path) -> Tree:
    """Ask the tree for the names of its options."""
    text = call(Tree(root), "launch/pretrain.py", ["--print_config"], scratch)
    sections = yaml.safe_load(text)
    return Tree(root, frozenset(dotted(sections)))


def dotted(sections: dict[str, Any], prefix: str = "") -> list[str]:
    """Return the names of all leaves, and of all sections: a leaf's value may be a dictionary."""
    names = []
    for key, value in sections.items():
        names.append(f"{prefix}{key}")
        if isinstance(value, dict):
            names += dotted(value, f"{prefix}{key}.")
    return names


def call(tree: Tree, script: str, words: list[str], folder: Path, world: int = 1, status: int = 0) -> str:
    """Run a script of the tree on `world` ranks in `folder`; return what they printed."""
    env = {**clean_environment(folder), "PYTHONPATH": str(tree.root), "XDG_CACHE_HOME": str(folder / "cache")}
    ranks = [env]
    if world > 1:
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world)}
        env["LOCAL_WORLD_SIZE"] = str(world)
        ranks = [{**env, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]
    statuses, output = run_scripts(tree.root / script, words, ranks, folder, timeout=300)
    assert statuses == [status] * world, f"{script} {' '.join(words)} in {tree.root}: {statuses}\n{output}"
    return output


def observe(tree: Tree, row: Row, folder: Path, corpus: Path, whole: bool = True) -> Observed:
    """Train, and with `whole` also plan, evaluate and export, in `folder`."""
    folder.mkdir(parents=True)
    options = options_of(row) | {"data.files": f"{corpus}/*.txt", "output_dir": "run"}
    words = words_for(options, tree.known)
    zero = ["--ds_config", str(tree.root / "ds_configs" / f"{row['zero']}.json")]
    world = world_of(row)
    if row["resumed"]:
        call(tree, "launch/pretrain.py", [*words, *zero, "--train.stop_after_steps", "5"], folder, world, status=75)
    call(tree, "launch/pretrain.py", [*words, *zero], folder, world)
    found = observe_run(folder / "run")
    return found | observe_tools(tree, words, zero, folder, world) if whole else found


def observe_run(run: Path) -> Observed:
    """Records, final model and checkpoints of a run."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found: Observed = {f"record {n}": strip(record) for n, record in enumerate(records)}
    for path in sorted(run.glob("metrics.head_*.jsonl")):
        found[path.name] = [strip(json.loads(line)) for line in path.read_text().splitlines()]
    meta = json.loads((run / "meta.json").read_text())
    found |= {f"meta {name}": meta[name] for name in ("parameters", "val_loss", "unigram_val_ppl", "vocab_size")}
    found |= model_digests(run / "final")
    for checkpoint in sorted((run / "checkpoints").iterdir()):
        found |= tensor_digests(checkpoint, f"{checkpoint.name} ")
    return found


def strip(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in OF_THE_CLOCK}


def tensor_digests(folder: Path, prefix: str) -> Observed:
    """Digests of all tensors in a folder's safetensors files, by file and name."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in sorted(file.keys()):
                tensor = file.get_tensor(key).contiguous()
                content = bytes(tensor.flatten().view(torch.uint8).numpy())
                digest = hashlib.sha256(content).hexdigest()[:16]
                found[f"{prefix}{path.name} {key}"] = [str(tensor.dtype), list(tensor.shape), digest]
    return found


def model_digests(folder: Path) -> Observed:
    """A Hugging Face folder: its tensors, and its configuration without the version that wrote it."""
    config = json.loads((folder / "config.json").read_text())
    config.pop("transformers_version", None)
    return {f"{folder.name} config": config} | tensor_digests(folder, f"{folder.name} ")


def observe_tools(tree: Tree, words: list[str], zero: list[str], folder: Path, world: int) -> Observed:
    """What is said before a run and made of it afterwards."""
    planned = [word for word in words if not word.startswith("--output_dir")]
    dry_run = [*planned, *zero, "--dry_run", "--dry_run_world", str(world)]
    found: Observed = {
        "dry run": numbers(call(tree, "launch/pretrain.py", dry_run, folder)),
        "evaluated": numbers(call(tree, "launch/pretrain.py", ["--evaluate_only", "--output_dir", "run"], folder)),
    }
    call(tree, "tools/convert_hf.py", ["export", "run", "exported", "--dtype", "fp32"], folder)
    found |= model_digests(folder / "exported")
    volume = ["--world", "4", "--out", "volume.json", *planned, *zero]
    if "--method.name=galore" not in words:  # the planners' ZeRO stages are not for it
        call(tree, "tools/gradient_volume.py", volume, folder)
        found["volume"] = numbers((folder / "volume.json").read_text())
        call(tree, "tools/plan.py", ["--nodes", "1", "--gpus", "4", "--out", "plan.json", *planned], folder)
        found["plan"] = numbers((folder / "plan.json").read_text())
    return found
