"""What a run writes of itself: its tokenizer, the record of a step, and at its end the outcome and the final model."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from transformers import PreTrainedTokenizerFast

from megatron_switchlora.checkpoint.files import replace_folder
from megatron_switchlora.data.hf_tokenizer import as_trained, load_tokenizer, save_tokenizer
from megatron_switchlora.hf.folders import export_model, joined_marks
from megatron_switchlora.model.llama.model import LlamaForCausalLM
from megatron_switchlora.planning.counts import model_flops_per_token
from megatron_switchlora.run.folder import in_folder
from megatron_switchlora.run.metrics_log import perplexity
from megatron_switchlora.startup.device import peak_flops, peak_memory_bytes
from megatron_switchlora.train.engine import StepResult

if TYPE_CHECKING:
    from megatron_switchlora.train.trainer import Trainer


def write_tokenizer(source: Path, folder: Path, add_bos: bool) -> tuple[PreTrainedTokenizerFast, dict[str, bytes]]:
    """Write the tokenizer of the data as it is trained with into a run's folder tokenizer/.

    Returns:
        It, and its files by their names beside tokenizer/, for checkpoints and the final model.
    """
    tokenizer = as_trained(load_tokenizer(str(source)), add_bos)
    replace_folder(folder, partial(save_tokenizer, tokenizer))
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
    """Raises: UserError, on a full or read-only disk, or if the run folder has vanished."""
    with in_folder(trainer.run.path):
        _write_outcome(trainer, val_loss, model)


def _write_outcome(trainer: Trainer, val_loss: float, model: LlamaForCausalLM) -> None:
    trainer.run.require_there(f"the final model cannot be written to {trainer.run.path / 'final'}")
    steps = [record for record in trainer.run.history if "loss" in record]
    trainer.run.update_meta(
        steps=trainer.last_step,
        val_loss=val_loss,
        val_ppl=perplexity(val_loss),
        dp_bytes_per_step=steps[-1].get("dp_bytes", 0) if steps else 0,
    )
    if trainer.mesh.axis("data").rank == 0:
        _export(trainer, model)
    trainer.run.plot()
    trainer.run.update_meta(finished=True)
    trainer.run.close()


def _export(trainer: Trainer, model: LlamaForCausalLM) -> None:
    """Write `final/` from the first data rank's tensor-parallel ranks, aside and then renamed."""
    final, seq_len = trainer.run.path / "final", trainer.config.train.seq_len
    if not trainer.run.writes:
        export_model(model, final, seq_len, {}, writes=False)
        return

    def fill(folder: Path) -> None:
        export_model(model, folder, seq_len, joined_marks(trainer.tokenizer, trainer.imported))
        for name, content in trainer.tokenizer_files.items():
            path = folder / Path(name).relative_to("tokenizer")
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)

    replace_folder(final, fill)
