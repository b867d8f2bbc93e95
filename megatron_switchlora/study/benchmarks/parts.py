"""Time the parts of a layer beside its products, and the loss, against what autograd makes of the plain expressions.

Forward and backward passes, in turn in one process; each time is divided by the plain one of its round, and medians
are reported. "held" is what the forward pass keeps for the backward pass, inputs included. On a GPU the functions are
also compiled; a device is waited for before a clock is read.

    norm      x / rms(x) * weight: ours, torch's F.rms_norm
    rotary    a rotation by position: ours
    swiglu    silu(gate) * up: silu(gate) formed again in the backward pass
    loss      output layer and cross entropy: a chunk of tokens at a time

    switchlora bench parts --out benchmarks/parts_cpu.json
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from megatron_switchlora.config.errors import require
from megatron_switchlora.config.field_checks import number_from
from megatron_switchlora.disk import user_path
from megatron_switchlora.distributed.cross_entropy import linear_cross_entropy
from megatron_switchlora.distributed.precision import PRECISIONS
from megatron_switchlora.distributed.shard import Axis, Split
from megatron_switchlora.model.elementwise import Elementwise, recomputed_swiglu
from megatron_switchlora.startup.device import choose_device
from megatron_switchlora.startup.door import the_door
from megatron_switchlora.startup.environment import Ranks, end_rank
from megatron_switchlora.study.benchmarks.common import describe_machine, publish
from megatron_switchlora.study.benchmarks.turns import ratio, wait_for

EPS, HEAD_DIM, SEQ_LEN = 1e-6, 64, 512
Forms = dict[str, Callable[..., Tensor]]


def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    high = x.float()
    return weight * (high * torch.rsqrt(high.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def plain_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return x * torch.cat((cos, cos), -1) + torch.cat((-right, left), dim=-1) * torch.cat((sin, sin), -1)


def plain_loss(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy((x @ weight.t()).float(), targets)


def parts(options: argparse.Namespace, dtype: torch.dtype, device: torch.device) -> dict[str, tuple[Forms, list]]:
    """Return the forms of each part, the plain one first, and its inputs."""
    torch.manual_seed(0)
    tokens, hidden = options.tokens, options.hidden_size

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype).requires_grad_()

    split = Split(0, options.vocab_size, Axis())
    targets = torch.randint(0, options.vocab_size, (tokens,), device=device)
    angles = torch.rand(SEQ_LEN, HEAD_DIM // 2, device=device)
    heads = draw(tokens // SEQ_LEN, SEQ_LEN, hidden // HEAD_DIM, HEAD_DIM)
    tables = [angles.cos().to(dtype), angles.sin().to(dtype)]
    gates = [draw(tokens, options.intermediate_size) for _ in range(2)]
    norm: Forms = {"plain": plain_norm, "torch": lambda x, w: F.rms_norm(x, (hidden,), w, EPS)}
    rotary: Forms = {"plain": lambda x, *t: plain_rotary(x.transpose(1, 2), *t)}
    swiglu: Forms = {"plain": lambda gate, up: F.silu(gate) * up}
    hows = {"ours": Elementwise()} | ({"compiled": Elementwise(compiled=True)} if device.type == "cuda" else {})
    for name, how in hows.items():
        norm[name] = lambda x, w, how=how: how.norm(x, w, EPS)
        rotary[name] = lambda x, *t, how=how: how.rotary(x.transpose(1, 2), *t)
        swiglu[name] = lambda gate, up, how=how: recomputed_swiglu(how, gate, up)
    loss: Forms = {"plain": plain_loss, "ours": lambda x, w, t: linear_cross_entropy(x, w, t, split)}
    return {
        "norm": (norm, [draw(tokens, hidden), draw(hidden)]), "rotary": (rotary, [heads, *tables]),
        "swiglu": (swiglu, gates), "loss": (loss, [draw(tokens, hidden), draw(options.vocab_size, hidden), targets]),
    }  # fmt: skip


def held_bytes(form: Callable[..., Tensor], inputs: list[Tensor]) -> int:
    """Return the bytes of the storages that a forward pass keeps for backward."""
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        form(*inputs)
    return sum(seen.values())


def seconds(form: Callable[..., Tensor], inputs: list[Tensor], grad: Optional[Tensor]) -> float:
    """Return the time of a forward and backward pass."""
    device = inputs[0].device
    wait_for(device)
    began = time.perf_counter()
    form(*inputs).backward(grad)
    wait_for(device)
    return time.perf_counter() - began


def compare(forms: Forms, inputs: list[Tensor], rounds: int) -> dict[str, Any]:
    """Return each form's time over the plain one's, and the bytes that it holds; the first round warms up."""
    with torch.no_grad():
        result = forms["plain"](*inputs)
    grad = torch.randn_like(result) if result.dim() else None
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(rounds + 1):
        for name, form in forms.items():
            times[name].append(seconds(form, inputs, grad))
    held = {name: held_bytes(form, inputs) for name, form in forms.items()}
    return {
        name: {
            "time_ratio": ratio(values[1:], times["plain"][1:], 3),
            "seconds": median(values[1:]),
            "held_bytes": held[name],
        }
        for name, values in times.items()
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Return ratios and bytes of all parts in each precision.

    Raises:
        UserError: a size does not divide.
    """
    for name, unit in (("tokens", SEQ_LEN), ("hidden_size", HEAD_DIM)):
        size = getattr(options, name)
        require(size % unit == 0, f"--{name} {size} must be a multiple of {unit}.")
    device = choose_device(options.device, Ranks(), options.threads)
    found: dict[str, Any] = {}
    for precision in options.precisions:
        found[precision] = {
            name: compare(forms, inputs, options.rounds)
            for name, (forms, inputs) in parts(options, PRECISIONS[precision], device).items()
        }
    sizes = ("tokens", "hidden_size", "intermediate_size", "vocab_size", "rounds")
    return {**{name: getattr(options, name) for name in sizes}, **found, "machine": describe_machine()}


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=number_from(SEQ_LEN), default=2048)
    parser.add_argument("--hidden_size", type=number_from(HEAD_DIM), default=512)
    parser.add_argument("--intermediate_size", type=number_from(1), default=1376)
    parser.add_argument("--vocab_size", type=number_from(1), default=8192)
    parser.add_argument("--rounds", type=number_from(1), default=11)
    parser.add_argument("--precisions", nargs="+", choices=tuple(PRECISIONS), default=list(PRECISIONS))
    parser.add_argument("--threads", type=number_from(0), default=0, help="0: those of a rank alone")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=user_path, default=None, help="also write the JSON here")
    with the_door():
        options = parser.parse_args(argv)
        publish(measure(options), options.out)
        end_rank(0)
