"""Wrap DeepSpeed; this is the only module that imports it.

It starts DeepSpeed's communication and builds its engine around the model, with the row-step optimizer as the client
optimizer. One training step is:
    forward and backward pass of each micro-batch, in which DeepSpeed reduces the gradients
    method.before_step (switching), then norm, clip, row-step AdamW, and DeepSpeed's all-gather of parameters
    method.after_step (merges), method.renew_weights (gathers W_eff), then one all-reduce of losses, health and votes
With non-finite gradients DeepSpeed skips or spoils a step, depending on stage and precision. Here the optimizer refuses
them, and `StepResult.healthy` is False on every rank. At ZeRO 1 and 2 norm, check and clip are the package's and stay
on the device: its code waits for the device once per step, in `_agree`. In DeepSpeed's other classes they are its own.
tests/dist/test_deepspeed_contract.py asserts the properties of DeepSpeed 0.19.8 on which this module relies.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import warnings
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Optional

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_switchlora.config.ds_config import for_deepspeed, leaves_norm_to_us
from megatron_switchlora.config.errors import UserError
from megatron_switchlora.config.run import RunConfig
from megatron_switchlora.distributed.alone import Alone
from megatron_switchlora.distributed.consensus import gather_texts
from megatron_switchlora.distributed.mesh import Mesh
from megatron_switchlora.distributed.recorder import CommRecorder
from megatron_switchlora.distributed.replica_check import differing
from megatron_switchlora.distributed.shard import is_split
from megatron_switchlora.methods.base import Method
from megatron_switchlora.model.protocol import LanguageModel
from megatron_switchlora.optim.head_clip import HeadClip
from megatron_switchlora.optim.layout import deepspeed_layout, partition_gradients
from megatron_switchlora.startup.device import pinned
from megatron_switchlora.startup.environment import complete_environment, meets_on_loopback


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, equal on all ranks except bytes and values of single heads."""

    loss: float
    """Mean over all heads."""
    head_losses: tuple[float, ...]
    """Losses of the heads here."""
    head_norms: tuple[float, ...]
    """Gradient norms of the heads here, before the clip."""
    grad_norm: float
    """Gradient norm of the first head here."""
    lr: float
    switched: int
    dp_bytes: int
    merge_bytes: int
    """Bytes of model state that this rank gave to collectives with other LTE heads."""
    control_bytes: int
    """Bytes of losses, health and votes that this rank gave to such collectives."""
    healthy: bool
    votes: tuple[int, ...]
    """How many ranks voted yes on each question of `train_step`."""


def start_distributed(device: torch.device, timeout_s: float = 300.0, store: Optional[dist.Store] = None) -> None:
    """Initialise DeepSpeed's and torch's communication from the launcher's environment.

    `store` is the store through which the ranks have met, if they have. A single process opens no port.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    complete_environment(os.environ)
    # The original prints 16 lines and resets the statistics of peak memory.
    deepspeed.runtime.bf16_optimizer.see_memory_usage = lambda *_, **__: None
    if device.type == "cpu":
        # The first start would compile it for a minute, and a killed build blocks every later one.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend, timeout = "nccl" if device.type == "cuda" else "gloo", timedelta(seconds=timeout_s)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if world == 1:
        store = dist.HashStore()
    keep_within_host(os.environ, world)
    if store is not None:
        bound = device if device.type == "cuda" else None  # as in DeepSpeed
        store.set_timeout(timeout)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout, device_id=bound)
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=timeout)


def keep_within_host(env: MutableMapping[str, str], world: int) -> None:
    """Bind ranks that meet within this host to the loopback interface, unless the user names an interface."""
    if meets_on_loopback(env) and "lo" in [name for _, name in socket.if_nameindex()]:
        for name in ("GLOO_SOCKET_IFNAME", *(["NCCL_SOCKET_IFNAME"] if world == 1 else [])):
            env.setdefault(name, "lo")


def communication_log() -> dict[str, int]:
    """Return the bytes by operation that DeepSpeed has counted since the last call, if its `comms_logger` is on.

    They are the sizes that it passes to collectives, including calls on groups of one rank.
    """
    sizes: dict[str, dict[int, list[Any]]] = deepspeed.comm.comm.comms_logger.comms_dict
    totals = {name: sum(size * entry[0] for size, entry in calls.items()) for name, calls in sizes.items()}
    sizes.clear()
    return totals


def limit_waiting(timeout_s: float) -> None:
    """Set the time-out of all groups, as DeepSpeed's groups have torch's default, half an hour with gloo."""
    for group in dist.distributed_c10d._world.pg_map:
        if isinstance(group, dist.ProcessGroup) and not isinstance(group, Alone):
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s), group)


class Engine:
    """The model under DeepSpeed; `ds_config` comes from `resolve_ds_config`."""

    def __init__(
        self,
        model: LanguageModel,
        method: Method,
        config: RunConfig,
        ds_config: dict[str, Any],
        mesh: Mesh,
        device: torch.device,
    ) -> None:
        self.config, self.mesh, self.method, self.device = config, mesh, method, device
        self.recorder = CommRecorder()
        self.optimizer = method.build_optimizer()
        self.params = [param for group in self.optimizer.param_groups for param in group["params"]]
        model.checkpointing = config.train.activation_checkpointing
        self.ds, *_ = deepspeed.initialize(
            model=model.to(device), optimizer=self.optimizer, config=for_deepspeed(ds_config), mpu=mesh,
            dist_init_required=False,
        )  # fmt: skip
        limit_waiting(config.parallel.timeout)
        self.model: LanguageModel = self.ds.module
        self.optimizer.attach(deepspeed_layout(self.ds.optimizer, self.params))
        heads = config.method.facts.heads_here
        if heads > 1 or leaves_norm_to_us(ds_config):
            ranks = mesh.axis("head" if self.optimizer.partitioned else "tp")
            self.optimizer.head_clip = HeadClip(config.optim.clip, heads, ranks, mesh.axis("tp"), device)
        method.start(self.optimizer)
        self._check_replicas()

    def _check_replicas(self) -> None:
        """Require that ranks with the same parameters, frozen weights, banks or switching state hold equal values.

        Raises:
            UserError: values differ.
        """
        differences = self.differing_replicas()
        if differences:
            raise UserError(
                f"The ranks start with different values: {differences[0]} ({len(differences)} such differences). Start "
                "all ranks with the same code, configuration and library versions."
            )

    def differing_replicas(self) -> list[str]:
        """Return a sentence for each tensor that should be equal on several ranks but is not.

        The result is the same on every rank. Collective over the world.
        """
        replicas = list(self.method.replicas())
        differences = []
        for group in ("dp", "lte", "head", "data", "across"):
            named = [(replica.name, replica.tensor) for replica in replicas if replica.group == group]
            if named:
                differences += differing(named, self.mesh.group(group), self.device)
        texts = gather_texts("\n".join(differences))
        return list(dict.fromkeys(sentence for text in texts for sentence in text.splitlines()))

    def _set_lr(self, step: int) -> float:
        factor = self.method.lr_factor(step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        return self.config.lr * factor

    def _before_step(self) -> Optional[Tensor]:
        """Add what DeepSpeed lacks at stage 0.

        In fp32 compute and return the gradients' norm, also over tensor-parallel ranks. In bf16 mark gradients of
        shards, on which DeepSpeed's own norm depends, and return None.
        """
        if self.ds.optimizer is self.optimizer:
            norms = {
                split: torch.nn.utils.get_total_norm(
                    [p.grad for p in self.params if p.grad is not None and is_split(p) == split]
                ).to(self.device)
                for split in (False, True)
            }
            squares = norms[True] ** 2
            if self.mesh.size("tp") > 1:
                dist.all_reduce(squares, group=self.mesh.group("tp"))
            norm = (norms[False] ** 2 + squares).sqrt()
            self.optimizer.refuse_step = not bool(torch.isfinite(norm))
            return norm
        for param in self.params:
            if param.grad is not None:
                param.grad.tensor_model_parallel = is_split(param)
        return None

    def train_step(
        self, step: int, micro_batches: list[Tensor], votes: Callable[[], Sequence[bool]] = tuple
    ) -> StepResult:
        """Train step `step` (from 0) on this rank's micro-batches, each [micro_batch_size, S + 1] tokens.

        At the step's end `votes` returns this rank's answers to the questions on which ranks must agree. They are sent
        with the loss. The loss is read last, so a clock on the host measures the step's time on the device.
        """
        lr = self._set_lr(step)
        losses = torch.zeros(self.model.heads, dtype=torch.float64, device=self.device)
        self.recorder.clear()
        switched, norm = 0, None
        self.ds.train()
        with self.recorder:
            for index, tokens in enumerate(micro_batches):
                tokens = tokens.to(self.device, non_blocking=True)
                loss = self.ds(tokens[:, :-1], tokens[:, 1:])
                losses += loss.detach()
                with self.recorder.phase("gradient"):
                    self.ds.backward(loss if loss.dim() == 0 else loss.sum())
                if index == len(micro_batches) - 1:
                    with self.recorder.phase("switch"):
                        switched = self.method.before_step(step)
                    norm = self._before_step()
                    self._measure_heads()
                with self.recorder.phase("step"):
                    self.ds.step()
            with self.recorder.phase("merge"):
                self.method.after_step(step)
            with self.recorder.phase("base"):
                self.method.renew_weights()
            norms = self._head_norms(norm)
            with self.recorder.phase("control"):
                head_losses, head_norms, mean, bad_ranks, counts = self._agree(
                    losses / len(micro_batches), norms, votes()
                )
        return StepResult(
            loss=mean,
            head_losses=head_losses,
            head_norms=head_norms,
            grad_norm=head_norms[0],
            lr=lr,
            switched=switched,
            dp_bytes=self.recorder.total("gradient", self.mesh.group("dp")),
            merge_bytes=self._across_heads(None) - self._across_heads("control"),
            control_bytes=self._across_heads("control"),
            healthy=bad_ranks == 0 and math.isfinite(mean),
            votes=counts,
        )

    def _measure_heads(self) -> None:
        """Measure the norms by which several heads here are clipped, unless the optimizer measures them itself."""
        clip = self.optimizer.head_clip
        if clip is not None:
            clip.measured = False
            pairs = partition_gradients(self.ds.optimizer)
            if pairs is not None:
                clip.measure(pairs)

    def _head_norms(self, norm: Optional[Tensor]) -> Tensor:
        """Return the gradient norms of the heads here; `norm` is a single head's, if DeepSpeed did not compute it."""
        if self.optimizer.head_clip is not None:
            return self.optimizer.head_clip.norms
        single = norm if norm is not None else self.ds.get_global_grad_norm()
        return torch.as_tensor(single, dtype=torch.float64, device=self.device).view(1)

    def _across_heads(self, phase: Optional[str]) -> int:
        """Return the bytes that this rank gave to collectives with ranks of other heads, in one phase or in all.

        These are all groups except those within its own head.
        """
        if self.mesh.size("lte") == 1:
            return 0
        within = {self.mesh.group(name) for name in ("head", "dp", "tp")}  # names may share a group
        return self.recorder.total(phase) - sum(self.recorder.total(phase, group) for group in within)

    def _agree(
        self, losses: Tensor, norms: Tensor, votes: Sequence[bool]
    ) -> tuple[tuple[float, ...], tuple[float, ...], float, float, tuple[int, ...]]:
        """Average the heads' losses [K] over the data ranks, and agree with all ranks on health and votes.

        Everything that a step reads from the device is read here, at once.

        Returns:
            (losses and gradient norms of the heads here, mean loss of all heads, number of unhealthy ranks, votes)
        """
        skipped = bool(getattr(self.ds.optimizer, "overflow", False))
        answers = torch.tensor([self.optimizer.found_nonfinite or skipped, *votes], dtype=losses.dtype)
        self.optimizer.found_nonfinite = False
        answers = pinned(answers, self.device).to(self.device, non_blocking=True)
        answers[0] = torch.maximum(answers[0], norms.isfinite().all().logical_not().to(answers.dtype))
        share = losses if self.mesh.rank("tp") == 0 else torch.zeros_like(losses)  # equal on tensor-parallel ranks
        shared = torch.cat([share, answers])
        dist.all_reduce(shared, group=self.mesh.group("head"))
        here = shared[: len(losses)] / self.mesh.size("dp")
        control = torch.cat([here.mean().view(1), shared[len(losses) :]])
        if self.mesh.size("lte") > 1:
            if self.mesh.axis("head").rank > 0:  # only the head's first rank contributes
                control.zero_()
            dist.all_reduce(control, group=self.mesh.group("world"))
            control[0] /= self.mesh.size("lte")
        values, heads = torch.cat([here, norms, control]).tolist(), len(here)
        mean, bad_ranks, *counts = values[2 * heads :]
        return tuple(values[:heads]), tuple(values[heads : 2 * heads]), mean, bad_ranks, tuple(map(int, counts))

    def evaluate(self, batches: Iterable[Tensor]) -> tuple[float, int]:
        """Evaluate the method's model on the validation batches of all ranks.

        Returns:
            (mean cross entropy per token, bytes of model state that this rank gave to other heads for it)
        """
        self.recorder.clear()
        with self.recorder:
            model = self.method.evaluated()
        return mean_loss(model, batches, self.mesh.group("data"), self.device), self._across_heads(None)


@torch.no_grad()
def mean_loss(model: LanguageModel, batches: Iterable[Tensor], group: dist.ProcessGroup, device: torch.device) -> float:
    """Return the mean cross entropy per token over the group's batches, each [samples, S + 1] tokens. Collective."""
    training = model.training
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for tokens in batches:
        tokens = tokens.to(device)
        loss = model(tokens[:, :-1], tokens[:, 1:])
        count = tokens[:, 1:].numel()
        sums += torch.stack([loss.double() * count, torch.full_like(sums[0], count)])
    dist.all_reduce(sums, group=group)
    model.train(training)
    return float(sums[0] / sums[1])
