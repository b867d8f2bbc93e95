"""Collect the facts of a run that are fixed once its data is open, for results and summaries."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Optional

import torch

from megatron_switchlora.config.run import RunConfig
from megatron_switchlora.data.loader import BatchOrder, Samples
from megatron_switchlora.data.packing import PreparedData
from megatron_switchlora.distributed.consensus import on_one_rank
from megatron_switchlora.planning.counts import ParameterCounts, count_run
from megatron_switchlora.startup.environment import Ranks
from megatron_switchlora.train.dataset import data_identity, prepare_data, vocabulary_size


@dataclass(frozen=True)
class RunContext:
    """A run's facts, equal on all ranks except `ranks` and `device`.

    `identity` is what a checkpoint stores about text and tokenizer. `last_step` is the number of steps, which the data
    may limit to fewer than `train.steps`.
    """

    config: RunConfig
    ranks: Ranks
    device: torch.device
    data: PreparedData
    train_samples: Samples
    val_samples: Samples
    order: BatchOrder
    last_step: int
    vocab_size: int
    identity: dict[str, Any]
    counts: ParameterCounts


def open_context(
    config: RunConfig, ranks: Ranks, device: torch.device, data: Optional[PreparedData] = None
) -> RunContext:
    """Prepare the data, unless it is given, and compute the facts that follow from it. Collective over the world.

    Raises:
        UserError: the data cannot be prepared, or does not fit the configuration.
    """
    train = config.train
    data = data or prepare_data(config, ranks)
    train_samples, val_samples = data.train.samples(train.seq_len), data.val.samples(train.seq_len)
    order = BatchOrder(len(train_samples), train.global_batch_size, train.seed)
    available = order.batches_in(train.epochs) if train.epochs else train.steps
    vocab_size = vocabulary_size(config, data)
    identity = on_one_rank(ranks.rank == 0, lambda: json.dumps(data_identity(data, vocab_size)))
    counts = count_run(config, vocab_size)
    return RunContext(
        config, ranks, device, data, train_samples, val_samples, order, min(train.steps, available), vocab_size,
        json.loads(identity), counts,
    )  # fmt: skip
