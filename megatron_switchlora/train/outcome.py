"""What a run writes of itself: its tokenizer, the record of a step, and at its end the outcome and the final model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from transformers import PreTrainedTokenizerFast

from megatron_switchlora.disk import make_durable, make_tree_durable
from megatron_switchlora.hf_tokenizer import as_trained, load_tokenizer, save_tokenizer
from megatron_switchlora.model.counts import model_flops_per_token
from megatron_switchlora.model.hf import export_model, joined_marks
from megatron_switchlora.model.llama import LlamaForCausalLM
from megatron_switchlora.train.device import peak_flops, peak_memory_bytes
from megatron_switchlora.train.engine import StepResult
from megatron_switchlora.train.records import perplexity
from megatron_switchlora.train.run_folder import in_folder

if TYPE_CHECKING:
    from megatron_switchlora.train.trainer import Trainer


def write_tokenizer(source: Path, folder: Path, add_bos: bool) -> tuple[PreTrainedTokenizerFast, dict[str, bytes]]:
    """Write the tokenizer of the data as it is trained with into a run's folder tokenizer/.

    Returns:
        It, and its files by their names beside tokenizer/, for checkpoints and the final model.
    """
    tokenizer = as_trained(load_tokenizer(str(source)), add_bos)
    save_tokenizer(tokenizer, folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return tokenizer, {path.relative_to(folder.parent).as_posix(): path.read_bytes() for path in files}


def step_record(trainer: Trainer, step: int, result: StepResult, seconds: float, elapsed: float) -> dict[str, Any]:
    """What metrics.jsonl holds of step number `step` (from 0), which took `seconds`; the run has trained `elapsed`."""
    train = trainer.config.train
    tokens = train.global_batch_size * train.seq_len
    record: dict[str, Any] = {
        "step": step + 1,
        "loss": result.loss,
        "lr": result.lr,
        "grad_norm": result.grad_norm,
        "tokens": (step + 1) * tokens,
        "seconds": elapsed,
        "tokens_per_second": tokens / seconds,
        "peak_memory_bytes": peak_memory_bytes(trainer.device),
        "dp_bytes": result.dp_bytes,
        "switched": result.switched,
    }
    if trainer.mesh.size("lte") > 1:
        record |= {"merge_bytes": result.merge_bytes, "control_bytes": result.control_bytes}
    peak = peak_flops(trainer.device, train.precision)
    if peak:
        flops = model_flops_per_token(trainer.config.model, trainer.vocab_size, train.seq_len)
        record["mfu"] = flops * tokens / seconds / (peak * dist.get_world_size())
    return record


def write_results(trainer: Trainer, val_loss: float, model: LlamaForCausalLM) -> None:
    """Raises: UserError, on a full or read-only disk."""
    with in_folder(trainer.run.path):
        _write_outcome(trainer, val_loss, model)


def _write_outcome(trainer: Trainer, val_loss: float, model: LlamaForCausalLM) -> None:
    steps = [record for record in trainer.run.history if "loss" in record]
    trainer.run.update_meta(
        steps=len(steps),
        val_loss=val_loss,
        val_ppl=perplexity(val_loss),
        dp_bytes_per_step=steps[-1]["dp_bytes"] if steps else 0,
    )
    if trainer.mesh.axis("data").rank == 0:
        _export(trainer, model)
    trainer.run.plot()
    trainer.run.update_meta(finished=True)
    trainer.run.close()


def _export(trainer: Trainer, model: LlamaForCausalLM) -> None:
    """Write `final/` from the first data rank's tensor-parallel ranks, aside and then renamed."""
    building = trainer.run.path / "final.tmp"
    if trainer.run.writes:
        shutil.rmtree(building, ignore_errors=True)  # of a start that was killed right here
        building.mkdir()
    marks = joined_marks(trainer.tokenizer, trainer.imported) if trainer.run.writes else {}
    export_model(model, building, trainer.config.train.seq_len, marks, writes=trainer.run.writes)
    if trainer.run.writes:
        for name, content in trainer.tokenizer_files.items():
            path = building / Path(name).relative_to("tokenizer")
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
        make_tree_durable(building)
        if (trainer.run.path / "final").exists():  # likewise; it is this model
            shutil.rmtree(trainer.run.path / "final")
        building.rename(trainer.run.path / "final")
        make_durable(trainer.run.path)
