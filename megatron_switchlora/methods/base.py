"""Define what the trainer asks of a method, and the parameter groups that all methods share.

The life of a method:
    constructor    takes the initialised model, and may replace its linears
    start          runs once the engine has cast and broadcast the parameters
    before_step    runs in each step between the last backward pass and the clip
    after_step     runs in each step after the optimizer
    renew_weights  runs after it, and after `start` and `loaded`
The parameter groups, in order:
    matrices    the decoder's matrices, or their adapters, at `optim.lr`
    dense       embedding and output layer, at `optim.dense_lr`
    norms       also at `optim.dense_lr`, without weight decay
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Optional

import torch
from torch import Tensor, nn

from megatron_switchlora.config.run import RunConfig
from megatron_switchlora.distributed.mesh import Mesh
from megatron_switchlora.distributed.shard import has_rows
from megatron_switchlora.distributed.slices import TensorSlice, replica_group, shard_slice
from megatron_switchlora.model.protocol import LanguageModel
from megatron_switchlora.optim.row_adamw import RowAdamW, new_state
from megatron_switchlora.optim.schedules import lr_factor


@dataclass(frozen=True)
class Replica:
    """A tensor that must be equal on all ranks of a group: "dp", "across", "lte", "head" or "data"."""

    name: str
    tensor: Tensor
    group: str


FlowKind = Literal["gradients", "parameters", "base", "bank", "tensor parallel", "merges"]


@dataclass(frozen=True)
class Flow:
    """Bytes that a rank gives to one kind of collective.

    `part` is a group of parameters, or empty. `axis` is an axis of the mesh, or several of them together.
    """

    kind: FlowKind
    part: str
    axis: str
    op: str
    bytes: float


def host_copy(tensor: Tensor, dtype: Optional[torch.dtype] = None) -> Tensor:
    """Return a copy in host memory; of a tensor on the meta device, one there."""
    return tensor.detach().to("meta" if tensor.is_meta else "cpu", dtype or tensor.dtype, copy=True)


class Method:
    """Base of all methods: train the trainable parameters and do nothing else."""

    def __init__(
        self,
        config: RunConfig,
        model: LanguageModel,
        mesh: Mesh,
        factors: Optional[dict[str, tuple[Tensor, Tensor]]] = None,
    ) -> None:
        self.config, self.model, self.mesh = config, model, mesh
        self.adapt(factors)
        if config.freezes_dense:
            trained = {id(param) for param in self.matrices()}
            for param in model.parameters():
                param.requires_grad_(id(param) in trained)

    def adapt(self, factors: Optional[dict[str, tuple[Tensor, Tensor]]]) -> None:
        """Replace linears of the initialised model, on the CPU; `factors` are LoRA-GA's initial values."""

    def matrices(self) -> list[nn.Parameter]:
        """Return the trainable tensors of the decoder's linears."""
        raise TypeError("a method must return the decoder's tensors that it trains")

    def param_groups(self) -> list[dict[str, Any]]:
        """Return the optimizer's groups, each with `name`, `base_lr` and `weight_decay`."""
        optim, lr, dense_lr = self.config.optim, self.config.lr, self.config.dense_lr
        matrices = self.matrices()
        matrix_ids = {id(param) for param in matrices}
        rest = [param for param in self.model.parameters() if param.requires_grad and id(param) not in matrix_ids]
        groups: list[dict[str, Any]] = [
            {"name": "matrices", "params": matrices, "base_lr": lr, "weight_decay": optim.weight_decay},
            {"name": "dense", "params": [p for p in rest if p.dim() > 1], "base_lr": dense_lr,
             "weight_decay": optim.weight_decay},
            {"name": "norms", "params": [p for p in rest if p.dim() <= 1], "base_lr": dense_lr, "weight_decay": 0.0},
        ]  # fmt: skip
        return [group for group in groups if group["params"]]  # frozen dense tensors leave their groups empty

    def build_optimizer(self) -> RowAdamW:
        """Return the optimizer of the parameter groups; its layout is set later."""
        optim = self.config.optim
        return RowAdamW(self.param_groups(), beta1=optim.beta1, beta2=optim.beta2, eps=optim.eps)

    def start(self, optimizer: RowAdamW) -> None:
        """Finish initialisation once parameters have their final precision and are equal on all data ranks."""
        self.optimizer = optimizer
        self.allocate()

    def allocate(self) -> None:
        """Create the tensors of `slices`, now that parameters have their final precision.

        A plan calls it on the meta device, where tensors have shapes alone: no collectives, no arithmetic.
        """

    def lr_factor(self, step: int) -> float:
        """Return the factor by which `step` (from 0) multiplies every group's `base_lr`."""
        return lr_factor(step, self.config.train.warmup_steps, self.config.train.steps)

    def before_step(self, step: int) -> int:
        """Act between the last backward pass of `step` (from 0) and the clip; return the number of switched vectors."""
        return 0

    def after_step(self, step: int) -> None:
        """Act after the optimizer's update of `step` (from 0)."""

    def renew_weights(self) -> None:
        """Gather what the forward pass uses of other ranks' weights, after they have changed. Collective.

        Only this does so, at a fixed point of each step: ranks may run different numbers of forward passes.
        """

    def stored_name(self, name: str) -> str:
        """Return the name of the model's parameter in a checkpoint."""
        return name

    def frozen_group(self, param: nn.Parameter) -> str:
        """Return the mesh group of ranks that hold the same of a frozen dense tensor."""
        return replica_group(param)

    def buffer_group(self, module: nn.Module) -> Optional[str]:
        """Return the mesh group of ranks that hold the same buffers of a module; None: no other rank does."""
        return "dp"

    def evaluated(self, exported: bool = False) -> LanguageModel:
        """Return the model to evaluate or to export. Collective."""
        return self.model

    def slices(self) -> Iterator[TensorSlice]:
        """Yield this rank's share of what a checkpoint keeps beside parameters and optimizer state.

        The base class yields the frozen weights. A method adds its own state.
        """
        for name, module in self.model.named_modules():
            splits = getattr(module, "splits", None) or filter(None, [getattr(module, "split", None)])
            for short, buffer in module.named_buffers(recurse=False):
                yield shard_slice(f"{name}.{short}", buffer, splits, self.buffer_group(module))

    @property
    def kinds(self) -> dict[str, str]:
        """Return what a plan calls the tensors of `slices` and optimizer state, by the last word of their names.

        A word without an entry is its own kind. Kinds in host memory end in these words.
        """
        moments = dict.fromkeys(("exp_avg", "exp_avg_sq"), "Adam moments, fp32")
        return {"weight": "frozen W, fp32", **moments, "row_step": "Adam step counters"}

    def optimizer_state(self, param: nn.Parameter) -> dict[str, Tensor]:
        """Return the state that the optimizer keeps of a parameter, shaped as without ZeRO."""
        return new_state(param, param.size(0) if has_rows(param) else 1)

    def flows(self, partitioned: bool) -> Iterator[tuple[Flow, float]]:
        """Yield what the method itself gives to collectives, and the mean number of steps between two times.

        `partitioned` tells whether ZeRO partitions the masters.
        """
        yield from ()

    def loaded(self) -> None:
        """Act after a checkpoint has filled parameters, optimizer state and the method's own state. Collective."""

    def replicas(self) -> Iterator[Replica]:
        """Yield every tensor of which several ranks hold the same copy.

        The base class yields parameters and buffers (the frozen weights, split like trainable matrices). A method adds
        its own state.
        """
        for name, param in self.model.named_parameters():
            yield Replica(name, param, replica_group(param))
        for name, module in self.model.named_modules():
            group = self.buffer_group(module)
            if group is not None:
                for short, buffer in module.named_buffers(recurse=False):
                    yield Replica(f"{name}.{short}", buffer, group)
