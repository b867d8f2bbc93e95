"""Decide whether a run starts fresh or resumes from a checkpoint.

    --resume auto    resumes the run in --output_dir, if there is one, from its newest published checkpoint
    --resume PATH    resumes from a checkpoint, or from the newest one of a run
    --resume none    always starts a fresh run
Rank 0 locks the folder and decides. All ranks share the work of verifying the files. The folder stays unchanged until
all checks have passed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Optional

import torch.distributed as dist

from megatron_switchlora.checkpoint.files import Checkpoint, damaged, open_checkpoint, published, strays
from megatron_switchlora.checkpoint.resume_rules import compare
from megatron_switchlora.checkpoint.weights import find_folder, stored_config, wrong_fields
from megatron_switchlora.config.errors import UserError, require
from megatron_switchlora.config.run import RunConfig
from megatron_switchlora.config.yaml_text import read_yaml
from megatron_switchlora.disk import shown
from megatron_switchlora.distributed.consensus import await_all, gather_texts, on_all_ranks, on_one_rank
from megatron_switchlora.run.folder import holds_run, lock_folder, read_meta, refuse_folder


@dataclass
class ResumePoint:
    """Where a run starts: at step 0, or after a checkpoint."""

    checkpoint: Optional[Checkpoint] = None
    """What it resumes from; None for a fresh run."""
    keeps_records: bool = False
    """Whether the run folder's records up to the checkpoint stay."""
    finished: bool = False
    """Whether nothing is left to do."""
    notes: list[str] = field(default_factory=list)
    lock: Optional[BinaryIO] = None
    """Rank 0's lock on the folder of a resumed run."""

    @property
    def step(self) -> int:
        return self.checkpoint.step if self.checkpoint else 0


def find_resume_point(config: RunConfig) -> ResumePoint:
    """Decide on rank 0 how the run starts, and verify the checkpoint on all ranks. Collective over the world.

    Raises:
        UserError: the folder must not be used, or the checkpoint is damaged or has another configuration.
    """
    locks: list[BinaryIO] = []
    choice = json.loads(on_one_rank(dist.get_rank() == 0, lambda: json.dumps(choose(config, locks))))
    folder = choice.pop("folder")
    checkpoint = open_together(Path(folder)) if folder else None
    return ResumePoint(checkpoint, **choice, lock=locks[0] if locks else None)


def open_together(folder: Path) -> Checkpoint:
    """Open a checkpoint on every rank and verify each of its files on one rank. Collective over the world.

    Raises:
        UserError: on every rank, if any rank cannot open the checkpoint, or files are missing or damaged; the message
            names them.
    """
    checkpoint = on_all_ranks(lambda: open_checkpoint(folder))  # some host may not see the folder
    names = sorted(checkpoint.files)[dist.get_rank() :: dist.get_world_size()]
    faults = checkpoint.faults(names)
    await_all()  # files differ in size, so ranks finish at different times
    texts = gather_texts("\n".join(faults))
    all_faults = [fault for text in texts for fault in text.splitlines()]
    if all_faults:
        damaged(folder, "; ".join(all_faults))
    return checkpoint


def choose(config: RunConfig, locks: list[BinaryIO]) -> dict[str, Any]:
    """Return rank 0's decision: the checkpoint's folder or "", and `ResumePoint`'s other fields.

    If the run resumes in its own folder, that folder's lock is added to `locks`.
    """
    output = Path(config.output_dir).absolute() if config.output_dir else None
    start: dict[str, Any] = {"folder": "", "keeps_records": False, "finished": False, "notes": []}
    if output:
        start["notes"] = [_ignored(path) for path in strays(output / "checkpoints")]
    if config.resume == "none" or (config.resume == "auto" and (output is None or not holds_run(output))):
        if output:
            refuse_folder(output)
        return start
    source = None if config.resume == "auto" else find_folder(Path(config.resume)).resolve()
    if output and (source is None or (_branched(output, source) and published(output / "checkpoints"))):
        return start | _own_run(config, output, locks, start["notes"])
    assert source is not None
    checkpoint = open_checkpoint(source)
    require(
        "data" in checkpoint.state(),
        f"{source} holds only weights, not a run to resume: start from it with --train.init_from.",
    )
    compare(config, stored_config(checkpoint), f"Checkpoint {source}")
    if output is None or source.parent != (output / "checkpoints").resolve():
        again = output is not None and (_branched(output, source) or _just_claimed(output))
        if output and again:  # killed before its first checkpoint
            locks.append(lock_folder(output))
        elif output:
            refuse_folder(output)
        return start | {"folder": str(source), "keeps_records": again}
    newest = published(source.parent)[-1]
    require(
        newest.name == source.name,
        f"{output} holds {newest.name}, which is newer than --resume {source} and is never overwritten: give another "
        "--output_dir, or move the newer checkpoints away.",
    )
    locks.append(lock_folder(output))
    return start | {"folder": str(source), "keeps_records": True}


def _ignored(path: Path) -> str:
    return f"{shown(path)} was ignored: it is not a folder step-00000000 (eight digits) with a checkpoint in it"


def _branched(output: Path, source: Path) -> bool:
    """Return whether the output folder's run started from this checkpoint: then the same command resumes that run."""
    return read_meta(output).get("branched_from") == str(source)


def _own_run(config: RunConfig, output: Path, locks: list[BinaryIO], notes: list[str]) -> dict[str, Any]:
    """Resume the run in the output folder."""
    stored_path = output / "config.yaml"
    if not stored_path.is_file() and not published(output / "checkpoints") and not _just_claimed(output):
        refuse_folder(output)
    locks.append(lock_folder(output))
    meta, checkpoints = read_meta(output), published(output / "checkpoints")
    stored = stored_config(open_checkpoint(checkpoints[-1])) if checkpoints else _read_config(stored_path)
    if stored is not None:
        compare(config, stored, f"The run in {output}")
        train = stored.get("train", {})
        same_length = all(train.get(name) == getattr(config.train, name) for name in ("steps", "epochs"))
        if meta.get("finished") and same_length:
            return {"finished": True}
    if checkpoints:
        return {"folder": str(checkpoints[-1]), "keeps_records": True}
    if (output / "final").exists():
        refuse_folder(output)
    note = f"{output} holds no published checkpoint: the run starts from step 0, and earlier records are set aside"
    return {"keeps_records": True, "notes": [*notes, note]}


def _read_config(path: Path) -> Optional[dict[str, Any]]:
    """Return a run's configuration, or None if it has written none."""
    if not path.is_file():
        return None
    try:
        stored = read_yaml(path)
    except ValueError:
        stored = None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give access, or repair its disk.") from None
    valid = isinstance(stored, dict) and "train" in stored and not wrong_fields(RunConfig, stored)
    require(valid, f"{path} is damaged, and there is no checkpoint: move the folder away, or use another --output_dir.")
    return stored


def _just_claimed(output: Path) -> bool:
    """Return whether a run was killed here before it wrote its first record."""
    records = output / "metrics.jsonl"
    return not records.is_symlink() and records.is_file() and not records.stat().st_size and not read_meta(output)
