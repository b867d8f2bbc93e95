"""Find the first tensor that is not finite, once, after a step with a non-finite loss or gradient.

The optimizer has refused the step, so the weights are still those that produced it. The micro-batches run again. Hooks
check each module's output, then the gradients of outputs and trainable weights in the order of the backward pass. They
keep a flag on the device of each tensor and not the tensor, so that this needs no more memory than a step. No `.grad`
changes. Only tensor-parallel collectives run, so every rank makes all passes before it returns. The loss is equal on
tensor-parallel ranks.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Optional

import torch
from torch import Tensor, nn

from megatron_switchlora.model.protocol import LanguageModel

Flags = list[tuple[str, Tensor]]
"""Phrases for tensors, each with whether it is finite, on the device."""


def _note(flags: Flags, phrase: str, tensor: Tensor) -> None:
    flags.append((phrase, torch.isfinite(tensor.detach()).all()))


def _note_gradient(flags: Flags, phrase: str, gradient: Tensor) -> None:
    _note(flags, phrase, gradient)


def _note_and_drop(flags: Flags, phrase: str, gradient: Tensor) -> Tensor:
    """Return zeros of the same shape that take no memory, since autograd collects what it is asked for."""
    _note(flags, phrase, gradient)
    return gradient.new_zeros(()).expand(gradient.shape)


def _watch(flags: Flags, gradients: Flags, name: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
    if isinstance(output, Tensor):
        _note(flags, f"the output of {name}", output)
        if output.requires_grad:
            output.register_hook(partial(_note_gradient, gradients, f"the gradient of the output of {name}"))


def _first_bad(flags: Flags) -> Optional[str]:
    """Return the first phrase whose tensor is not finite, with one wait for the device."""
    if not flags:
        return None
    finite = torch.stack([flag for _, flag in flags]).tolist()
    return next((phrase for (phrase, _), good in zip(flags, finite, strict=True) if not good), None)


def find_bad_layer(model: LanguageModel, micro_batches: list[Tensor], device: torch.device) -> Optional[str]:
    """Return a phrase for the first tensor that is not finite on this rank's data, or None. Collective over tp."""
    weights: Flags = []
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        _note(weights, f"the weights of {name}", tensor)
    bad = [_first_bad(weights)]
    for tokens in micro_batches:
        bad += _pass(model, tokens.to(device))
    return next(filter(None, bad), None)


def _pass(model: LanguageModel, tokens: Tensor) -> list[Optional[str]]:
    """Return phrases for what is not finite in a forward and backward pass: the first output, loss or gradient."""
    outputs: Flags = []
    gradients: Flags = []
    params = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    handles: list[Any] = [
        module.register_forward_hook(partial(_watch, outputs, gradients, name))
        for name, module in model.named_modules()
        if name
    ]
    try:
        loss = model(tokens[:, :-1], tokens[:, 1:])
        seen = list(outputs)  # activation checkpointing calls the hooks again
        _note(seen, "the loss", loss)
        bad = _first_bad(seen)
        if bad is None or bool(torch.isfinite(loss).all()):
            handles += [
                param.register_hook(partial(_note_and_drop, gradients, f"the gradient of {name}"))
                for name, param in params
            ]
            torch.autograd.grad(loss.sum(), [param for _, param in params], allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    return [bad, _first_bad(gradients)]
