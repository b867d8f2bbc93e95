"""Finding the first tensor that is not finite: in order, with no more memory than a step, and without a trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_switchlora.train.diagnose import find_bad_layer
from tests.plain import PlainRun, make_batches, peak_of, small_config

CPU = torch.device("cpu")


def run_of(name: str, checkpointing: bool = False, layers: int = 8) -> tuple[PlainRun, list[Tensor]]:
    run = PlainRun(small_config(name, model__num_layers=layers, model__hidden_size=96, train__seq_len=64))
    run.model.checkpointing = checkpointing
    return run, [make_batches(run.config, 1)[0][:2]]


def poison(run: PlainRun, layer: int, where: str) -> Any:
    """Make the output of a layer's up_proj, or the gradient of this output, bad."""

    def hook(_m: Any, _i: Any, output: Tensor) -> Tensor:
        if where == "gradient" and output.requires_grad:
            output.register_hook(lambda grad: grad * float("nan"))
        return output * (float("inf") if where == "output" else 1.0)

    return run.model.model.layers[layer].mlp.up_proj.register_forward_hook(hook)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["full", "switchlora"])
def test_the_first_bad_tensor_is_named(name: str, checkpointing: bool) -> None:
    run, batches = run_of(name, checkpointing, layers=4)
    assert find_bad_layer(run.model, batches, CPU) is None
    for where, wanted in (("output", "the output of model.layers.2.mlp.up_proj"),
                          ("gradient", "the gradient of model.layers.2.mlp.up_proj.")):  # fmt: skip
        handles = [poison(run, 2, where), poison(run, 1 if where == "gradient" else 3, where)]
        found = find_bad_layer(run.model, batches, CPU)
        assert found is not None and found.startswith(wanted), found
        for handle in handles:
            handle.remove()
    assert all(param.grad is None for param in run.params)
    assert run.model.checkpointing == checkpointing
    run.params[3].data.view(-1)[5] = float("inf")
    names = {id(param): name for name, param in run.model.named_parameters()}
    assert find_bad_layer(run.model, batches, CPU) == f"the weights of {names[id(run.params[3])]}"


@pytest.mark.parametrize("checkpointing", [False, True])
def test_it_takes_no_more_memory_than_a_step(checkpointing: bool) -> None:
    """Of the weights' gradients, which a step keeps, this keeps none."""
    run, (tokens,) = run_of("full", checkpointing)

    def step() -> None:
        run.model(tokens[:, :-1], tokens[:, 1:]).backward()

    step()  # now gradients exist
    needed = peak_of(step)
    before = [param.grad.clone() for param in run.params]  # type: ignore[union-attr]
    found = peak_of(lambda: find_bad_layer(run.model, [tokens], CPU))
    print(f"\nstep {needed:,}, diagnosis {found:,} bytes")
    assert found < 1.05 * needed
    for param, gradient in zip(run.params, before, strict=True):
        assert param.grad is not None and torch.equal(param.grad, gradient)
