"""LoRA-GA's start of a run: the gradient of every adapted matrix at the initial weights, and its factors.

The gradient is averaged over `method.ga.samples` training samples, drawn by the seed alone (a stream of its
own: no mesh and no batch size changes them), in the run's precision, with the run's micro-batches. The whole
model is needed once more for it, on the device, but only the adapted matrices take gradients, and a hook moves
each to the host as soon as autograd has it: the device holds one matrix's gradient at a time, the host the
fp32 sum of all. A sample weighs the same wherever it is computed, so that data-parallel ranks add up to the
mean. Under tensor parallelism a rank has the gradient of its part of W, and `lowrank/lora_ga.py` goes on
from there.
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

STREAM = 0x6A << 32  # keeps the draw of these samples apart from the data order of the same seed


def find_factors(
    config: RunConfig, model: LanguageModel, mesh: Mesh, samples: Samples, device: torch.device
) -> Optional[dict[str, tuple[Tensor, Tensor]]]:
    """This rank's A [r, in] and B transposed [r, out] of every adapted layer, by name, on the CPU, of K LTE heads here
    one after the other [K r, ...], each from samples of its own; None unless `method.init` is lora_ga. `model` is
    initialised, not adapted, and stays as it is. Collective over the head.

    Raises:
        UserError: too few training samples; a gradient that is zero or not finite.
    """
    method = config.method
    if method.init != "lora_ga":
        return None
    heads = mesh.heads(method.facts.heads_here)
    each = [_factors_of_head(config, model, mesh, samples, device, head) for head in heads]
    return {name: tuple(torch.cat([factors[name][side] for factors in each]) for side in (0, 1)) for name in each[0]}  # type: ignore[misc]


def _factors_of_head(
    config: RunConfig, model: LanguageModel, mesh: Mesh, samples: Samples, device: torch.device, head: int
) -> dict[str, tuple[Tensor, Tensor]]:
    method, seed = config.method, head_seed(config.train.seed, head)
    gradients = mean_gradients(config, model, mesh, samples, device, head) if method.ga.vectors == "gradient" else {}
    factors = {}
    for name, _, _, linear in model.decoder_linears():
        gradient = gradients.pop(name).to(device) if gradients else None
        A, B = initial_factors(linear, gradient, method, name, seed, device)
        factors[name] = A.cpu().contiguous(), B.cpu().contiguous()
    return factors


def mean_gradients(
    config: RunConfig, model: LanguageModel, mesh: Mesh, samples: Samples, device: torch.device, head: int = 0
) -> dict[str, Tensor]:
    """This rank's part of dL/dW [out, in] of every adapted matrix, by layer, on the host, in at least fp32."""
    model_copy = working_copy(config, model, device)
    count = config.method.ga.samples
    sums = sum_gradients(model_copy, gradient_batches(config, mesh, samples, head), count, device)
    del model_copy
    squares = torch.zeros(len(sums), dtype=torch.float64, device=device)
    for index, total in enumerate(sums.values()):
        if mesh.size("dp") > 1:  # through the device, a matrix at a time
            here = total.to(device)
            dist.all_reduce(here, group=mesh.group("dp"))
            total.copy_(here)
        squares[index] = total.double().square().sum().to(device)
    for name, square in zip(sums, leave(mesh.axis("tp"), squares).tolist(), strict=True):
        require(
            0 < square < float("inf"),
            f"LoRA-GA's gradient of {name} has norm {square**0.5} over {count} samples, so it has no singular vectors "
            "to begin from: check the initial weights (train.init_from) and the data, or use another method.init.",
        )
    return sums


def working_copy(config: RunConfig, model: LanguageModel, device: torch.device) -> LanguageModel:
    """The model on the device in the run's precision, of which only the decoder's matrices take gradients. What needs
    no conversion shares the model's memory."""
    model_copy = build_model(model.config, model.vocab_size, model.tp)
    model_copy.checkpointing = config.train.activation_checkpointing
    dtype = torch.bfloat16 if config.train.precision == "bf16" else None
    for copied, original in zip(model_copy.parameters(), model.parameters(), strict=True):
        copied.data = original.data.to(device, dtype or original.dtype)
        copied.requires_grad_(False)
    for _, _, _, linear in model_copy.decoder_linears():
        linear.weight.requires_grad_(True)
    return model_copy


def gradient_batches(config: RunConfig, mesh: Mesh, samples: Samples, head: int = 0) -> Iterator[Tensor]:
    """This data rank's micro-batches [up to micro_batch_size, S + 1] of the drawn samples; ranks may get unequal
    numbers, even none.

    Raises:
        UserError: at once, if there are fewer samples.
    """
    count, micro = config.method.ga.samples, config.train.micro_batch_size
    require(
        count <= len(samples),
        f"method.ga.samples {count} must not be more than the training samples, {len(samples)}: lower it.",
    )
    indices = BatchOrder(len(samples), count, config.train.seed, STREAM + head).indices(0)
    first, end = (count * (mesh.rank("dp") + i) // mesh.size("dp") for i in range(2))
    return (samples.batch(indices[i : min(i + micro, end)]) for i in range(first, end, micro))


def sum_gradients(
    model: LanguageModel, batches: Iterator[Tensor], count: int, device: torch.device
) -> dict[str, Tensor]:
    """Over these batches, the sum of the gradients of each sample's mean loss / count, by layer, on the host."""
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
    """Add a weight's gradient, just complete, to its sum on the host, and free it."""
    assert weight.grad is not None
    total.add_(weight.grad.to(total.device, total.dtype))
    weight.grad = None
