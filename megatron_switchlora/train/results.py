"""Write the results of a run: its tokenizer, a record per step, and at its end the outcome and the final model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Optional

import torch.distributed as dist
from transformers import PreTrainedTokenizerFast

from megatron_switchlora.checkpoint.files import replace_folder
from megatron_switchlora.data.hf_tokenizer import as_trained, load_tokenizer, save_tokenizer
from megatron_switchlora.distributed.mesh import Mesh
from megatron_switchlora.hf.folders import export_model, joined_marks
from megatron_switchlora.hf.model_card import CardFacts, model_card, write_card
from megatron_switchlora.model.protocol import LanguageModel
from megatron_switchlora.planning.counts import model_flops_per_token
from megatron_switchlora.run.folder import RunFolder, in_folder
from megatron_switchlora.run.metrics_log import perplexity
from megatron_switchlora.startup.device import peak_flops, peak_memory_bytes
from megatron_switchlora.train.context import RunContext
from megatron_switchlora.train.engine import StepResult


@dataclass(frozen=True)
class Companions:
    """What accompanies a model's weights."""

    tokenizer: PreTrainedTokenizerFast
    """The tokenizer as training used it."""
    files: dict[str, bytes]
    """The tokenizer's files, by names that start with tokenizer/."""
    imported: dict[str, Any]
    """The marks of the imported model from which the run started."""


def write_tokenizer(source: Path, folder: Path, add_bos: bool, imported: dict[str, Any]) -> Companions:
    """Write the data's tokenizer, as training uses it, to a run's folder tokenizer/."""
    tokenizer = as_trained(load_tokenizer(str(source)), add_bos)
    replace_folder(folder, partial(save_tokenizer, tokenizer))
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    named = {path.relative_to(folder.parent).as_posix(): path.read_bytes() for path in files}
    return Companions(tokenizer, named, imported)


def step_record(
    context: RunContext, mesh: Mesh, step: int, result: StepResult, seconds: float, elapsed: float
) -> dict[str, Any]:
    """Return the record of `step` (from 0) in metrics.jsonl.

    The step took `seconds`, and the run has trained for `elapsed` seconds.
    """
    train = context.config.train
    tokens = train.global_batch_size * train.seq_len
    record: dict[str, Any] = {
        "step": step + 1,
        "loss": result.loss,
        "lr": result.lr,
        "grad_norm": result.grad_norm,
        "tokens": (step + 1) * tokens,
        "seconds": elapsed,
        "tokens_per_second": tokens / seconds,
        "peak_memory_bytes": peak_memory_bytes(context.device),
        "dp_bytes": result.dp_bytes,
        "switched": result.switched,
    }
    if mesh.size("lte") > 1:
        record |= {"merge_bytes": result.merge_bytes, "control_bytes": result.control_bytes}
    peak = peak_flops(context.device, train.precision)
    if peak:
        flops = model_flops_per_token(context.config.model, context.vocab_size, train.seq_len)
        record["mfu"] = flops * tokens / seconds / (peak * dist.get_world_size())
    return record


def write_results(
    context: RunContext,
    run: RunFolder,
    beside: Optional[Companions],
    exports: bool,
    val_loss: float,
    model: LanguageModel,
) -> None:
    """Write the outcome and the final model.

    Only the rank that writes has `beside`. With `exports` this rank takes part in the export, as do all
    tensor-parallel ranks of the first data rank.

    Raises:
        UserError: the disk is full or read-only, or the run folder has vanished.
    """
    with in_folder(run.path):
        run.require_there(f"the final model cannot be written to {run.path / 'final'}")
        steps = [record for record in run.history if "loss" in record]
        run.update_meta(
            steps=context.last_step,
            val_loss=val_loss,
            val_ppl=perplexity(val_loss),
            dp_bytes_per_step=steps[-1].get("dp_bytes", 0) if steps else 0,
        )
        if exports:
            source = beside.imported.get("source") if beside else None
            facts = CardFacts(
                run.path.absolute().name, context.config.model, context.vocab_size, context.config, context.last_step,
                val_loss, run.meta, source,
            )  # fmt: skip
            _export(model, run.path / "final", context.config.train.seq_len, beside, facts)
        run.plot()
        run.update_meta(finished=True)
        run.close()


def _export(model: LanguageModel, final: Path, seq_len: int, beside: Optional[Companions], facts: CardFacts) -> None:
    """Write `final/` under another name and then rename it; ranks with nothing `beside` only give their shards."""
    if beside is None:
        export_model(model, final, seq_len, {}, writes=False)
        return

    def fill(folder: Path) -> None:
        export_model(model, folder, seq_len, joined_marks(beside.tokenizer, beside.imported))
        for name, content in beside.files.items():
            path = folder / Path(name).relative_to("tokenizer")
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
        write_card(folder, model_card(facts), before=final)

    replace_folder(final, fill)
