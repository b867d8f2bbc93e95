"""The package's parts driven by hand, without DeepSpeed and in any precision: what tests compare with."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Optional

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from megatron_switchlora.config.method import make_method
from megatron_switchlora.config.model import ModelConfig
from megatron_switchlora.config.optim import OptimConfig
from megatron_switchlora.config.run import RunConfig
from megatron_switchlora.config.train import TrainConfig
from megatron_switchlora.data.loader import Samples
from megatron_switchlora.distributed.mesh import Mesh, lone_mesh
from megatron_switchlora.distributed.shard import Axis
from megatron_switchlora.methods import build_method
from megatron_switchlora.methods.ga_gradients import find_factors
from megatron_switchlora.model.llama.model import LlamaForCausalLM
from megatron_switchlora.model.protocol import initialize_weights
from megatron_switchlora.optim.head_clip import HeadClip
from megatron_switchlora.optim.layout import plain_layout

VOCAB = 61


def small_config(name: str = "switchlora", **changes: object) -> RunConfig:
    """A model with grouped-query attention and three matrix shapes; 20 steps switch hundreds of vectors."""
    config = RunConfig(
        model=ModelConfig(
            hidden_size=48, intermediate_size=76, num_layers=3, num_heads=4, num_kv_heads=2, pad_multiple=1
        ),
        method=make_method(
            name, rank=7, switch__interval0=4.0, switch__freeze_steps=2, switch__ratio=1.0, switch__total_steps=2000
        ),
        optim=OptimConfig(lr=0.002),
        train=TrainConfig(
            steps=60, warmup_steps=5, seq_len=16, micro_batch_size=2, global_batch_size=8, threads=1, device="cpu"
        ),
    )
    for dotted, value in changes.items():
        *sections, field = dotted.split("__")
        section = functools.reduce(getattr, sections, config)
        assert hasattr(section, field), dotted
        setattr(section, field, value)
    return config


def make_batches(config: RunConfig, steps: int, seed: int = 1) -> list[Tensor]:
    """Random tokens [global batch, S + 1] for each step, skewed so that there is something to learn."""
    generator = torch.Generator().manual_seed(seed)
    shape = (steps, config.train.global_batch_size, config.train.seq_len + 1)
    return list((torch.rand(shape, generator=generator) ** 3 * VOCAB).long())


def by_heads(config: RunConfig, batch: Tensor, mesh: Mesh) -> list[Tensor]:
    """The micro-batches of this process: its heads' shares, of those its data rank's, head by head."""
    local, each = config.method.facts.heads_here, config.train.micro_batch_size // config.method.facts.heads_here
    shares = batch.unflatten(0, (config.heads, mesh.size("dp"), -1))
    mine = shares[mesh.heads(local), mesh.rank("dp")]
    return [piece.flatten(0, 1) for piece in mine.split(each, 1)]


def make_samples(config: RunConfig, count: int = 100, seed: int = 2) -> Samples:
    """A training text of random tokens, skewed likewise."""
    size = count * config.train.seq_len + 1
    return Samples((np.random.default_rng(seed).random(size) ** 3 * VOCAB).astype(np.uint16), config.train.seq_len)


def peak_of(act: Callable[[], None]) -> int:
    """Most bytes of tensors alive at once while `act` runs, beyond those alive before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        act()
    recorded = profiled.profiler.kineto_results.events()  # type: ignore[union-attr]
    events = sorted((e.start_ns(), e.nbytes()) for e in recorded if e.name() == "[memory]")
    held = most = 0
    for _, change in events:
        held += change
        most = max(most, held)
    return most


class PlainRun:
    """Model, method and optimizer in one process of a mesh without data-parallel ranks; `step` mirrors
    `train.engine.Engine.train_step`."""

    def __init__(
        self,
        config: RunConfig,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        mesh: Optional[Mesh] = None,
        seed: Optional[int] = None,
    ) -> None:
        self.config, self.mesh = config, mesh or lone_mesh()
        model = LlamaForCausalLM(config.model, VOCAB)
        initialize_weights(model, config.train.seed if seed is None else seed)
        self.model = model.to(dtype)
        factors = find_factors(config, self.model, self.mesh, make_samples(config), torch.device("cpu"))
        self.method = build_method(config, self.model, self.mesh, factors)
        self.model.to(device)
        self.optimizer = self.method.build_optimizer()
        self.params = [param for group in self.optimizer.param_groups for param in group["params"]]
        self.optimizer.attach(plain_layout(self.params))
        heads, clip = config.method.facts.heads_here, config.optim.clip
        self.optimizer.head_clip = HeadClip(clip, heads, Axis(), Axis(), torch.device(device))
        self.method.start(self.optimizer)

    def step(self, step: int, batch: Tensor) -> tuple[float, float, int]:
        """(loss, gradient norm, vectors switched) of one step on the whole batch; the sum of several heads' losses."""
        factor = self.method.lr_factor(step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        self.optimizer.zero_grad()
        pieces = by_heads(self.config, batch, self.mesh)
        loss = torch.stack([self.model(tokens[:, :-1], tokens[:, 1:]).sum() for tokens in pieces]).mean()
        loss.backward()
        switched = self.method.before_step(step)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.params if p.grad is not None])
        self.optimizer.step()
        self.method.after_step(step)
        return float(loss.detach()), float(norm), switched
