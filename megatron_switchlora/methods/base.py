"""What the trainer asks of a method, and the parameter groups all methods share.

Life of a method: constructed with the initialised model (it may replace linears); `start` once the
engine has cast and broadcast the parameters; then, each step, `before_step` between the last backward
and the clip, and `after_step` after the optimizer. Groups, in order: the decoder's matrices or their
adapters at `optim.lr`; embedding and head at `optim.dense_lr`; norms, also at dense_lr, never decayed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Optional

from torch import Tensor, nn

from megatron_switchlora.config.run import RunConfig
from megatron_switchlora.distributed.mesh import Mesh
from megatron_switchlora.distributed.slices import TensorSlice, replica_group, shard_slice
from megatron_switchlora.model.protocol import LanguageModel
from megatron_switchlora.optim.row_adamw import RowAdamW
from megatron_switchlora.optim.schedules import lr_factor


@dataclass(frozen=True)
class Replica:
    """A tensor that must be equal on all ranks of a group: "dp", "lte", "head" (dp x tp), or "data" (lte x dp)."""

    name: str
    tensor: Tensor
    group: str


class Method:
    """Base of all methods: does nothing beside training what is trainable."""

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
        """Replace linears of the initialised model, on the CPU; `factors` are initial ones found from gradients."""

    def matrices(self) -> list[nn.Parameter]:
        """The trainable tensors of the decoder's linears."""
        raise TypeError("a method says which of the decoder's tensors it trains")

    def param_groups(self) -> list[dict[str, Any]]:
        """Optimizer groups with `name`, `base_lr` and `weight_decay`."""
        optim, lr, dense_lr = self.config.optim, self.config.lr, self.config.dense_lr
        matrices = self.matrices()
        known = {id(param) for param in matrices}
        rest = [param for param in self.model.parameters() if param.requires_grad and id(param) not in known]
        groups: list[dict[str, Any]] = [
            {"name": "matrices", "params": matrices, "base_lr": lr, "weight_decay": optim.weight_decay},
            {"name": "dense", "params": [p for p in rest if p.dim() > 1], "base_lr": dense_lr,
             "weight_decay": optim.weight_decay},
            {"name": "norms", "params": [p for p in rest if p.dim() == 1], "base_lr": dense_lr, "weight_decay": 0.0},
        ]  # fmt: skip
        return [group for group in groups if group["params"]]  # none of frozen dense tensors

    def build_optimizer(self) -> RowAdamW:
        """The optimizer of these groups, without its layout yet."""
        optim = self.config.optim
        return RowAdamW(self.param_groups(), beta1=optim.beta1, beta2=optim.beta2, eps=optim.eps)

    def start(self, optimizer: RowAdamW) -> None:
        """The engine is ready: parameters have their final precision and are equal on all data ranks."""
        self.optimizer = optimizer

    def lr_factor(self, step: int) -> float:
        """Multiple of every group's `base_lr` at `step` (from 0)."""
        return lr_factor(step, self.config.train.warmup_steps, self.config.train.steps)

    def before_step(self, step: int) -> int:
        """Gradients of `step` (from 0) are complete, the clip comes next. Returns the vectors switched."""
        return 0

    def after_step(self, step: int) -> None:
        """The optimizer has stepped."""

    def stored_name(self, name: str) -> str:
        """How a checkpoint calls the model's parameter."""
        return name

    def frozen_group(self, param: nn.Parameter) -> str:
        """Return the mesh group of ranks that hold the same of a frozen dense tensor."""
        return replica_group(param)

    def evaluated(self, exported: bool = False) -> LanguageModel:
        """The model whose loss is the method's, or the one that is exported. Collective."""
        return self.model

    def slices(self) -> Iterator[TensorSlice]:
        """This rank's share of what a checkpoint keeps beside parameters and optimizer state: frozen weights here, and
        a method's own state."""
        for name, module in self.model.named_modules():
            for short, buffer in module.named_buffers(recurse=False):
                yield shard_slice(f"{name}.{short}", buffer, filter(None, [getattr(module, "split", None)]), "dp")

    def loaded(self) -> None:
        """Parameters, optimizer state and slices were filled from a checkpoint. Collective."""

    def replicas(self) -> Iterator[Replica]:
        """Everything that several ranks hold alike: parameters, buffers (frozen weights, split like the matrices they
        are), and a method's own state."""
        for name, param in self.model.named_parameters():
            yield Replica(name, param, replica_group(param))
        for name, buffer in self.model.named_buffers():
            yield Replica(name, buffer, "dp")
