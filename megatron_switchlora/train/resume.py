"""Where a run begins: anew, or from a checkpoint.

`--resume auto` continues the run in --output_dir, if there is one, from its newest published checkpoint;
PATH names a checkpoint, or a run whose newest is taken; none always begins anew. Rank 0 looks, all ranks
share the work of verifying the files, and nothing of the folder is changed before all is found in order.
The configuration must be the checkpoint's, but for what changes no result beyond rounding (FREE), and for
what `checkpoint.allow_changes` names of CHANGEABLE.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Optional

import torch
import torch.distributed as dist
import yaml

from megatron_switchlora.checkpoint.files import Checkpoint, open_checkpoint, published
from megatron_switchlora.config import RunConfig, UserError, require
from megatron_switchlora.model.weights import find_folder
from megatron_switchlora.parallel.agree import gather_texts, on_all_ranks, on_one_rank
from megatron_switchlora.rules import CHANGEABLE
from megatron_switchlora.train.run_folder import holds_run, refuse_folder

FREE = (
    "output_dir", "resume", "checkpoint.*", "parallel.*", "model.vocab_size", "data.*", "train.micro_batch_size",
    "train.eval_interval", "train.eval_samples", "train.check_interval", "train.activation_checkpointing",
    "train.device", "train.threads", "train.stop_after_*", "train.init_from", "method.compute", "method.merged_cache",
    "method.bank_device", "method.bank_spread",
)  # fmt: skip


@dataclass(frozen=True)
class Start:
    """How a run begins: `checkpoint` is what it continues from, `keeps_records` whether the run folder's records up to
    there stay, `finished` that there is nothing left to do."""

    checkpoint: Optional[Checkpoint] = None
    keeps_records: bool = False
    finished: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def step(self) -> int:
        return self.checkpoint.step if self.checkpoint else 0


def find_start(config: RunConfig, device: torch.device) -> Start:
    """Decide on rank 0, verify the checkpoint's files together. Collective over the world.

    Raises:
        UserError: a folder that may not be used, a damaged checkpoint, or one of another configuration.
    """
    choice = json.loads(on_one_rank(dist.get_rank() == 0, lambda: json.dumps(_choose(config)), device))
    if not choice["checkpoint"]:
        return Start(None, choice["keeps_records"], choice["finished"], choice["notes"])
    checkpoint = open_together(Path(choice["checkpoint"]), device)
    return Start(checkpoint, choice["keeps_records"], False, choice["notes"])


def open_together(folder: Path, device: torch.device) -> Checkpoint:
    """Open a checkpoint on every rank and verify its files, each on one. Collective over the world.

    Raises:
        UserError: on every rank, if a rank cannot open it, or files are missing or damaged, with their names.
    """
    on_all_ranks(lambda: open_checkpoint(folder), device)  # a host may not see it
    checkpoint = open_checkpoint(folder)
    names = sorted(checkpoint.files)[dist.get_rank() :: dist.get_world_size()]
    texts = gather_texts("\n".join(checkpoint.faults(names)), device)
    faults = [fault for text in texts for fault in text.splitlines()]
    if faults:
        others = [path.name for path in published(checkpoint.folder.parent) if path.name != checkpoint.folder.name]
        advice = f"move it away to go on from {others[-1]}" if others else "the run has no other"
        raise UserError(f"Checkpoint {checkpoint.folder} is damaged: {'; '.join(faults)}. Restore it, or {advice}.")
    return checkpoint


def _choose(config: RunConfig) -> dict[str, Any]:
    """What rank 0 finds: the checkpoint's path or "", whether records are kept, whether all is done, notes."""
    output = Path(config.output_dir) if config.output_dir else None
    found: dict[str, Any] = {"checkpoint": "", "keeps_records": False, "finished": False, "notes": []}
    if config.resume == "none" or (config.resume == "auto" and (output is None or not holds_run(output))):
        if output:
            refuse_folder(output)
        return found
    if config.resume == "auto":
        assert output is not None
        return found | _own_run(config, output)
    source = find_folder(Path(config.resume))
    checkpoint = open_checkpoint(source)
    compare(config, checkpoint.state()["config"], f"Checkpoint {source}")
    own = output is not None and source.resolve().parent == (output / "checkpoints").resolve()
    if output and not own:
        refuse_folder(output)
    newest = published(source.parent)[-1:] if own else []
    require(
        not newest or newest[0].name == source.name,
        f"{output} holds a newer checkpoint, {newest[0].name if newest else ''}, than --resume {source}, and nothing "
        "newer is ever overwritten: give another --output_dir, or move the newer ones away.",
    )
    return found | {"checkpoint": str(source), "keeps_records": own}


def _own_run(config: RunConfig, output: Path) -> dict[str, Any]:
    """Continue the run in the output folder."""
    checkpoints = published(output / "checkpoints")
    stored_path, meta_path = output / "config.yaml", output / "meta.json"
    meta = json.loads(meta_path.read_text(encoding="utf-8")) if meta_path.is_file() else {}
    if checkpoints:
        checkpoint = open_checkpoint(checkpoints[-1])
        compare(config, checkpoint.state()["config"], f"The run in {output}")
        return {"checkpoint": str(checkpoint.folder), "keeps_records": True, "finished": bool(meta.get("finished"))} | (
            {"checkpoint": ""} if meta.get("finished") else {}
        )
    if not stored_path.is_file():  # killed before its first file was written, or no run of ours
        records = output / "metrics.jsonl"
        mine = records.is_file() and not records.stat().st_size and not meta and not (output / "final").exists()
        if not mine:
            refuse_folder(output)
    else:
        stored = yaml.safe_load(stored_path.read_text(encoding="utf-8"))
        compare(config, stored, f"The run in {output}")
        require(
            not meta.get("finished") and not (output / "final").exists(),
            f"The output folder {output} already holds a finished run without checkpoints, which is never overwritten: "
            "choose another --output_dir or move the folder away.",
        )
    note = f"{output} holds no published checkpoint: the run begins anew, its earlier records are dropped"
    return {"keeps_records": True, "notes": [note]}


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as dotted names."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and not prefix:
            flat |= flatten(value, f"{name}.")
        else:
            flat[name] = value
    return flat


def compare(config: RunConfig, stored: dict[str, Any], what: str) -> None:
    """Raises: UserError, if the stored configuration differs in what may not change, naming both values."""
    mine, theirs = flatten(asdict(config)), flatten(asdict(RunConfig())) | flatten(stored)
    allowed = config.checkpoint.allow_changes
    names = [name for name in mine if mine[name] != theirs[name] and not _matches(name, (*FREE, *allowed))]
    if mine["method.name"] == theirs["method.name"] == "full":
        names = [name for name in names if not name.startswith("method.")]
    if not names:
        return
    listed = "; ".join(f"{name} is {theirs[name]!r} there and {mine[name]!r} here" for name in names[:5])
    more = f" (and {len(names) - 5} more)" if len(names) > 5 else ""
    changeable = [name for name in names if _matches(name, CHANGEABLE)]
    advice = f"--checkpoint.allow_changes '{json.dumps(changeable)}' takes the new values; else " if changeable else ""
    raise UserError(
        f"{what} has another configuration: {listed}{more}. {advice}give its values, or another --output_dir for a "
        "new run."
    )


def compare_data(config: RunConfig, state: dict[str, Any], here: dict[str, Any]) -> None:
    """Raises: UserError, if a checkpoint's run had another text, tokenizer or vocabulary; `here` are this run's."""
    allowed = "data" in config.checkpoint.allow_changes
    different = [key for key in here if state[key] != here[key] and not (allowed and key == "data")]
    if not different:
        return
    mine, theirs = asdict(config)["data"], state["config"]["data"]
    named = [f"data.{k} is {theirs.get(k)!r} there and {v!r} here" for k, v in mine.items() if theirs.get(k) != v]
    raise UserError(
        "The checkpoint's run read other text or another tokenizer: "
        + "; ".join(f"{key} is {str(state[key])[:20]} there and {str(here[key])[:20]} here" for key in different)
        + f" ({'; '.join(named) or 'the options are the same, so the files have changed'}). Give the same text and "
        "tokenizer, or --checkpoint.allow_changes '[\"data\"]' for another text with the same tokenizer."
    )


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)
