"""Find the first tensor that is not finite, once, after a step with a non-finite loss or gradient.

The optimizer has refused the step, so the weights are still those that produced it. The micro-batches run again. Hooks
check each module's output. Then the gradients of outputs and trainable weights are checked, in the order of the
backward pass. No `.grad` changes. Only tensor-parallel collectives run, so every rank makes all passes before it
returns. The loss is equal on tensor-parallel ranks.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor, nn

from megatron_switchlora.model.protocol import LanguageModel


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def _run(model: LanguageModel, tokens: Tensor) -> tuple[Tensor, list[tuple[str, Tensor]]]:
    """Return the loss and every module's output, in forward order."""
    outputs: list[tuple[str, Tensor]] = []

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                outputs.append((name, output))

        return hook

    handles = [m.register_forward_hook(keep(name)) for name, m in model.named_modules() if name]
    checkpointing, model.checkpointing = model.checkpointing, False
    try:
        return model(tokens[:, :-1], tokens[:, 1:]), outputs
    finally:
        model.checkpointing = checkpointing
        for handle in handles:
            handle.remove()


def find_bad_layer(model: LanguageModel, micro_batches: list[Tensor], device: torch.device) -> Optional[str]:
    """Return a phrase for the first tensor that is not finite on this rank's data, or None. Collective over tp."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    bad = [f"the weights of {name}" for name, tensor in tensors if not _finite(tensor)]
    for tokens in micro_batches:
        loss, outputs = _run(model, tokens.to(device))
        bad += [f"the output of {name}" for name, output in outputs if not _finite(output)]
        if not _finite(loss):
            bad.append("the loss")
        else:
            bad += _bad_gradients(model, loss, outputs)
    return bad[0] if bad else None


def _bad_gradients(model: LanguageModel, loss: Tensor, outputs: list[tuple[str, Tensor]]) -> list[str]:
    """Return phrases for the gradients that are not finite, in the order of the backward pass."""
    params = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    named = [(f"the gradient of the output of {n}", t) for n, t in reversed(outputs) if t.requires_grad]
    named += [(f"the gradient of {n}", p) for n, p in reversed(params)]
    gradients = torch.autograd.grad(loss.sum(), [tensor for _, tensor in named], allow_unused=True)
    pairs = zip(named, gradients, strict=True)
    return [name for (name, _), gradient in pairs if gradient is not None and not _finite(gradient)]
