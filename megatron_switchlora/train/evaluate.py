"""Evaluate a finished run: `--evaluate_only --output_dir RUN`.

It loads `RUN/final` into plain linears and measures the validation loss in fp32 on the run's own data. All options but
`--output_dir` and the device come from `RUN/config.yaml`. The loss equals that of the last record if the run trained in
fp32. A corpus that has changed since is an error, as it would give another tokenizer. The model is split over
tensor-parallel ranks as in the run if the number of ranks allows it. Otherwise every rank holds the whole model. The
loss is the same.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError

from megatron_switchlora.config.command_line import parse_arguments
from megatron_switchlora.config.errors import UserError, require
from megatron_switchlora.config.parallel import ParallelConfig
from megatron_switchlora.config.run import RunConfig
from megatron_switchlora.data.loader import eval_batches
from megatron_switchlora.distributed.consensus import await_all, on_all_ranks, on_one_rank
from megatron_switchlora.distributed.mesh import build_mesh
from megatron_switchlora.hf.folders import load_merged
from megatron_switchlora.model.protocol import LanguageModel, build_model
from megatron_switchlora.run.folder import read_meta
from megatron_switchlora.run.metrics_log import perplexity
from megatron_switchlora.startup.environment import Ranks
from megatron_switchlora.train.dataset import data_identity, prepare_data, vocabulary_size
from megatron_switchlora.train.engine import mean_loss


def evaluate_run(config: RunConfig, ranks: Ranks, device: torch.device) -> float:
    """Print and return the validation loss of the run in `config.output_dir`.

    Raises:
        UserError: the folder holds no finished run, or its corpus has changed.
    """
    folder = Path(config.output_dir or "")
    require(
        (folder / "meta.json").is_file() and (folder / "config.yaml").is_file(),
        f"{folder} holds no run (config.yaml and meta.json): give the folder of a finished run with --output_dir.",
    )
    stored = parse_arguments(["--config", str(folder / "config.yaml")], kept_in=folder).config
    tp = stored.parallel.tp if ranks.world_size % stored.parallel.tp == 0 else 1
    mesh = build_mesh(ParallelConfig(tp=tp, timeout=config.parallel.timeout))
    data = prepare_data(stored, ranks)
    vocab_size = vocabulary_size(stored, data)
    trained_on = read_meta(folder).get("data")
    require(trained_on is not None, f"{folder}/meta.json is damaged: restore it. {folder}/final can still be loaded.")
    tokens = on_one_rank(ranks.rank == 0, lambda: str(data_identity(data, vocab_size)["data"]))
    require(
        tokens == trained_on,
        f"The text that {folder} was trained on has changed since (the fingerprint of its tokens is {tokens} now and "
        f"was {trained_on}), so its numbers cannot be repeated: restore the files that its config.yaml lists.",
    )
    with device:
        model = build_model(stored.model, vocab_size, mesh.axis("tp"))
    on_all_ranks(lambda: _load(model, folder / "final"))
    train = stored.train
    batches = eval_batches(
        data.val.samples(train.seq_len), train.micro_batch_size, mesh.rank("dp"), mesh.size("dp"), train.eval_samples
    )
    loss = mean_loss(model, batches, mesh.group("dp"), device)
    if ranks.rank == 0:
        print(f"{folder}: validation loss {loss:.6f}, perplexity {perplexity(loss):.3f}", flush=True)
    await_all()
    return loss


def _load(model: LanguageModel, final: Path) -> None:
    try:
        load_merged(model, final)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{final} cannot be read ({error}): restore it, or export the run's newest checkpoint."
        ) from None
