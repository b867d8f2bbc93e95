"""Find LoRA-GA's initial factors from the gradient of every adapted matrix at the initial weights.

The gradient is the mean over `method.ga.samples` training samples, in the run's precision and micro-batches. The seed
alone selects the samples, in a stream of its own, so mesh and batch size do not change them. Each sample has the same
weight on any rank, so the sum over data-parallel ranks is the mean.

The device holds a second copy of the model meanwhile. Only the adapted matrices take gradients. A hook moves each
gradient to the host as soon as autograd has computed it. So the device holds those of two or three matrices, and the
host holds the fp32 sums of all. Under tensor parallelism a rank has the gradient of its shard of W, from which
`lowrank/lora_ga.py` computes the factors.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Optional

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_switchlora.config.errors import require
from megatron_switchlora.config.run import RunConfig
from megatron_switchlora.data.loader import BatchOrder, Samples
from megatron_switchlora.distributed.collectives import leave
from megatron_switchlora.distributed.mesh import Mesh
from megatron_switchlora.distributed.precision import at_least_fp32
from megatron_switchlora.lowrank.lora_ga import initial_factors
from megatron_switchlora.methods.lora import head_seed
from megatron_switchlora.model.protocol import LanguageModel, build_model
from megatron_switchlora.startup.progress import progress

STREAM = 0x6A << 32  # separates these samples' random stream from the data order of the same seed


def find_factors(
    config: RunConfig, model: LanguageModel, mesh: Mesh, samples: Samples, device: torch.device
) -> Optional[dict[str, tuple[Tensor, Tensor]]]:
    """Return LoRA-GA's initial (A, B transposed) of every adapted layer, by name. Collective over the head.

    These are this rank's shards, [r, in] and [r, out], on the CPU. With K LTE heads here they are concatenated,
    [K r, ...], and each head uses samples of its own. The result is None unless `method.init` is lora_ga. `model` must
    be initialised and not yet adapted. It stays unchanged.

    Raises:
        UserError: there are too few training samples, or a gradient is zero or not finite.
    """
    method = config.method
    if method.init != "lora_ga":
        return None
    heads = mesh.heads(method.facts.heads_here)
    by_head = [_factors_of_head(config, model, mesh, samples, device, head) for head in heads]
    return {
        name: tuple(torch.cat([factors[name][side] for factors in by_head]) for side in (0, 1))  # type: ignore[misc]
        for name in by_head[0]
    }


def _factors_of_head(
    config: RunConfig, model: LanguageModel, mesh: Mesh, samples: Samples, device: torch.device, head: int
) -> dict[str, tuple[Tensor, Tensor]]:
    method, seed = config.method, head_seed(config.train.seed, head)
    gradients = mean_gradients(config, model, mesh, samples, device, head) if method.ga.vectors == "gradient" else {}
    factors = {}
    linears = list(model.decoder_linears())
    for name, _, _, linear in progress(linears, "LoRA-GA's factors", "matrices"):
        gradient = gradients.pop(name).to(device) if gradients else None
        A, B = initial_factors(linear, gradient, method, name, seed, device)
        factors[name] = A.cpu().contiguous(), B.cpu().contiguous()
    return factors


def mean_gradients(
    config: RunConfig, model: LanguageModel, mesh: Mesh, samples: Samples, device: torch.device, head: int = 0
) -> dict[str, Tensor]:
    """Return this rank's shard of dL/dW [out, in] of every adapted matrix, by layer name.

    The gradients are on the host, in at least fp32.

    Raises:
        UserError: a gradient is zero or not finite.
    """
    gradient_model = working_copy(config, model, device)
    count = config.method.ga.samples
    sums = sum_gradients(gradient_model, gradient_batches(config, mesh, samples, head), count, device)
    del gradient_model
    squares = torch.zeros(len(sums), dtype=torch.float64, device=device)
    for index, total in enumerate(sums.values()):
        if mesh.size("dp") > 1:  # through the device, one matrix at a time
            on_device = total.to(device)
            dist.all_reduce(on_device, group=mesh.group("dp"))
            total.copy_(on_device)
        squares[index] = total.double().square().sum().to(device)
    for name, square in zip(sums, leave(mesh.axis("tp"), squares).tolist(), strict=True):
        require(
            0 < square < float("inf"),
            f"LoRA-GA's gradient of {name} over {count} samples has norm {square**0.5}, so it has no singular vectors "
            "to start from: check the initial weights (train.init_from) and the data, or use another method.init.",
        )
    return sums


def working_copy(config: RunConfig, model: LanguageModel, device: torch.device) -> LanguageModel:
    """Copy the model to the device in the run's precision; only the decoder's matrices take gradients.

    A tensor that needs no conversion shares the original's memory.
    """
    copied = build_model(model.config, model.vocab_size, model.tp)
    copied.checkpointing = config.train.activation_checkpointing
    dtype = torch.bfloat16 if config.train.precision == "bf16" else None
    for target, source in zip(copied.parameters(), model.parameters(), strict=True):
        target.data = source.data.to(device, dtype or source.dtype)
        target.requires_grad_(False)
    for _, _, _, linear in copied.decoder_linears():
        linear.weight.requires_grad_(True)
    return copied


def gradient_batches(config: RunConfig, mesh: Mesh, samples: Samples, head: int = 0) -> Iterator[Tensor]:
    """Return this data rank's micro-batches [up to micro_batch_size, S + 1] of the samples for the gradient.

    Ranks may get different numbers of batches, even none.

    Raises:
        UserError: the training data has fewer samples; raised before the first batch is taken.
    """
    count, micro = config.method.ga.samples, config.train.micro_batch_size
    require(
        count <= len(samples),
        f"method.ga.samples {count} must not exceed the number of training samples, {len(samples)}: lower it.",
    )
    indices = BatchOrder(len(samples), count, config.train.seed, STREAM + head).indices(0)
    first, end = (count * (mesh.rank("dp") + i) // mesh.size("dp") for i in range(2))
    starts = progress(range(first, end, micro), "LoRA-GA's gradients", "micro-batches")
    return (samples.batch(indices[i : min(i + micro, end)]) for i in starts)


def sum_gradients(
    model: LanguageModel, batches: Iterator[Tensor], count: int, device: torch.device
) -> dict[str, Tensor]:
    """Sum the gradients of each sample's mean loss / `count` over the batches, by layer, on the host."""
    weights = {name: linear.weight for name, _, _, linear in model.decoder_linears()}
    sums = {name: torch.zeros(weight.shape, dtype=at_least_fp32(weight.dtype)) for name, weight in weights.items()}
    hooks = [
        weight.register_post_accumulate_grad_hook(partial(_take_gradient, sums[name]))
        for name, weight in weights.items()
    ]
    for tokens in batches:
        tokens = tokens.to(device)
        loss = model(tokens[:, :-1], tokens[:, 1:])
        (loss * (len(tokens) / count)).backward()
    for hook in hooks:
        hook.remove()
    return sums


def _take_gradient(total: Tensor, weight: nn.Parameter) -> None:
    """Add a weight's complete gradient to its sum on the host, and free it."""
    assert weight.grad is not None
    total.add_(weight.grad.to(total.device, total.dtype))
    weight.grad = None
