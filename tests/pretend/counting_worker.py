"""Counts of one training step of `Engine` on the pretend GPU, with 24 layers of 7 matrices as at 1.3B and tiny widths.

All vectors of a layer side are due at every step, so every layer switches. DeepSpeed is a stand-in that keeps ZeRO 1's
layout of one rank of eight: the optimizer steps an eighth of each group's flat tensor, group by group.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from megatron_switchlora.config.model import ModelConfig
from megatron_switchlora.config.run import RunConfig
from megatron_switchlora.data.loader import BatchOrder, ReadAhead, Reader, TrainLoader
from megatron_switchlora.distributed.mesh import build_mesh
from megatron_switchlora.distributed.recorder import CommRecorder
from megatron_switchlora.distributed.shard import Axis
from megatron_switchlora.methods import build_method
from megatron_switchlora.model.llama.model import LlamaForCausalLM
from megatron_switchlora.model.protocol import initialize_weights
from megatron_switchlora.optim.head_clip import HeadClip
from megatron_switchlora.optim.layout import Piece
from megatron_switchlora.optim.row_adamw import RowAdamW
from megatron_switchlora.train.engine import Engine, start_distributed
from tests.layouts import partitioned
from tests.plain import VOCAB, make_samples, small_config
from tests.pretend.gpu import Counts, PretendGpu, register

DP, RANK, STEPS = 8, 3, 2


def act(payload: dict[str, Any]) -> dict[str, Any]:
    """Return the counts of the switch, of AdamW, of forward and backward, and of the step's lines in the package.

    They are those of the second step.
    """
    register()
    start_distributed(torch.device("cpu"))
    with PretendGpu() as gpu:
        engine, stand_in = build_engine(payload["name"], payload.get("layers", 24), payload.get("changes", {}), gpu)
        switch = Counts()
        loader = read_ahead(engine.config, gpu.device)
        for step in range(STEPS):
            whole, stand_in.adamw, stand_in.micro_batch = gpu.fresh(), Counts(), Counts()
            switch = count_switch(engine, gpu)
            result = engine.train_step(step, loader.micro_batches(step))
        assert result.healthy and (result.switched > 0 or payload["name"] != "switchlora")
    return {
        "switched": result.switched,
        "switch": switch.totals(),
        "AdamW": stand_in.adamw.totals(),
        "micro-batch": stand_in.micro_batch.totals(),
        "step": own_lines(whole).totals(),
        "waits": dict(own_lines(whole).waits.most_common(12)),
        "launches": dict(stand_in.adamw.launches.most_common(12)),
    }


def own_lines(counts: Counts) -> Counts:
    """Leave out what no line of the package asked for: the stand-in, and autograd."""
    own = Counts()
    for kind, lines in vars(counts).items():
        kept = {line: count for line, count in lines.items() if not line.startswith(("tests/", "elsewhere"))}
        getattr(own, kind).update(kept)
    return own


@contextlib.contextmanager
def counted_into(counts: Counts, gpu: PretendGpu) -> Iterator[None]:
    """Add what happens inside to these counts too."""
    with gpu.part() as part:
        yield
    for kind, lines in vars(part).items():
        getattr(counts, kind).update(lines)


def count_switch(engine: Engine, gpu: PretendGpu) -> Counts:
    """Count the method's part between backward and clip in the next step."""
    counts, before_step = Counts(), type(engine.method).before_step

    def counted(step: int) -> int:
        with counted_into(counts, gpu):
            return before_step(engine.method, step)

    engine.method.before_step = counted  # type: ignore[method-assign]
    return counts


def make_config(name: str, layers: int, changes: dict[str, Any]) -> RunConfig:
    config = small_config(name, **changes)
    config.model = ModelConfig(hidden_size=64, intermediate_size=171, num_layers=layers, num_heads=2)
    config.method.rank, config.train.precision = 16, "bf16"
    config.method.switch.interval0, config.method.switch.freeze_steps = 1.25, 0
    config.method.switch.total_steps = 10**9
    config.train.micro_batch_size = config.train.global_batch_size = 1
    return config


def read_ahead(config: RunConfig, device: torch.device) -> ReadAhead:
    train, samples = config.train, make_samples(config)
    order = BatchOrder(len(samples), train.global_batch_size, train.seed)
    return ReadAhead(TrainLoader(samples, order, train.micro_batch_size, Reader()), device, STEPS)


def build_engine(name: str, layers: int, changes: dict[str, Any], gpu: PretendGpu) -> tuple[Engine, StandIn]:
    """What `Engine.__init__` makes, around the stand-in."""
    config = make_config(name, layers, changes)
    mesh = build_mesh(config.parallel)
    model = LlamaForCausalLM(config.model, VOCAB)
    initialize_weights(model, config.train.seed)
    method = build_method(config, model, mesh, None)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.to(gpu.device, torch.bfloat16)
    for name, weight in buffers.items():  # DeepSpeed casts no buffers
        parent, attribute = name.rsplit(".", 1)
        model.get_submodule(parent)._buffers[attribute] = weight.to(gpu.device)
    engine = Engine.__new__(Engine)
    engine.config, engine.mesh, engine.method, engine.device = config, mesh, method, gpu.device
    engine.recorder, engine.optimizer, engine.model = CommRecorder(), method.build_optimizer(), model
    engine.params = [param for group in engine.optimizer.param_groups for param in group["params"]]
    stand_in = StandIn(model, engine.optimizer, gpu)
    engine.ds = stand_in
    method.start(engine.optimizer)
    return engine, stand_in


class StandIn:
    """What the engine asks of DeepSpeed at ZeRO 1, for one rank of `DP`."""

    def __init__(self, model: nn.Module, optimizer: RowAdamW, gpu: PretendGpu) -> None:
        self.module, self.client, self.gpu = model, optimizer, gpu
        self.adamw, self.micro_batch = Counts(), Counts()
        self.optimizer = SimpleNamespace(overflow=False)
        self.norm: Any = torch.zeros((), device=gpu.device)
        layout, self.masters = partitioned(optimizer, DP, RANK)
        optimizer.attach(layout)
        optimizer.head_clip = HeadClip(1.0, 1, Axis(), Axis(), gpu.device)

    def train(self) -> None:
        self.module.train()

    def __call__(self, *inputs: Tensor) -> Tensor:
        with counted_into(self.micro_batch, self.gpu):
            return self.module(*inputs)

    def backward(self, loss: Tensor) -> None:
        with counted_into(self.micro_batch, self.gpu):
            loss.backward()

    def get_global_grad_norm(self) -> Tensor:
        return self.norm

    def step(self) -> None:
        """Step group by group, with gradients of ones; the step has one micro-batch."""
        groups, clip = self.client.param_groups, self.client.head_clip
        assert clip is not None
        for master in self.masters:
            master.grad = torch.ones_like(master)
        clip.measure((piece.param, piece.block(piece.master.grad)) for piece in pieces_of(self.client))
        for group in groups:
            self.client.param_groups = [group]
            with counted_into(self.adamw, self.gpu):
                self.client.step()
        self.client.param_groups = groups
        self.module.zero_grad()


def pieces_of(optimizer: RowAdamW) -> list[Piece]:
    """Return all pieces of the rank's masters."""
    assert optimizer.layout is not None
    return [piece for pieces in optimizer.layout.by_master.values() for piece in pieces]
