"""Train GaLore (arXiv 2403.03507): every weight trains, the matrices by Adam in a low-rank gradient space.

The parameter groups are those of full-rank training. Only the optimizer differs (`optim/galore.py`). These options are
errors before training:
    ZeRO 1 and 2          flat partitions cut matrices anywhere
    tensor parallelism    a rank has only a part of each gradient
    bf16                  untested with GaLore
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Optional

from torch import Tensor, nn

from megatron_switchlora.config.errors import require
from megatron_switchlora.config.facts import option
from megatron_switchlora.config.method import MethodFacts, register
from megatron_switchlora.config.run import RunConfig
from megatron_switchlora.distributed.shard import without_padding
from megatron_switchlora.methods.adapter_options import check_rank
from megatron_switchlora.methods.base import Method
from megatron_switchlora.methods.full import Full
from megatron_switchlora.optim.galore import GaloreAdamW, load_projector, projected_state
from megatron_switchlora.optim.row_adamw import RowAdamW


@dataclass
class GaloreOptions:
    """Adam in a low-rank space of the gradients (GaLore, arXiv 2403.03507), with method.name galore."""

    update_gap: int = option(200)
    """Steps between decompositions of the gradients."""
    scale: float = option(0.25)
    """Scale of the update that is projected back."""


@register
class GaloreFacts(MethodFacts):
    """Facts of GaLore: every weight trains, as in full-rank training."""

    name = "galore"
    about = "every weight, by Adam in a low-rank space of the gradients (needs the package galore-torch)"
    reads = frozenset({"rank"})
    sections = {"galore": GaloreOptions}  # noqa: RUF012
    adapts = False

    @property
    def kind(self) -> type[Method]:
        return Galore

    @property
    def default_lr(self) -> float:
        """The paper's rate (arXiv 2403.03507), for updates that are scaled by method.galore.scale."""
        return 0.01

    def require_packages(self) -> None:
        load_projector()

    def check_zero(self, stage: int) -> None:
        require(
            stage == 0,
            f"method.name galore needs the singular vectors of whole gradients, but ZeRO stage {stage} cuts them over "
            "the ranks (without --ds_config it is stage 1): use ds_configs/zero0.json.",
        )

    def check(self, config: RunConfig) -> None:
        galore, tp = config.method.galore, config.parallel.tp
        check_rank(config)
        require(
            tp == 1,
            f"method.name galore needs the singular vectors of whole gradients, but with parallel.tp {tp} a rank has "
            "only a part of each: set parallel.tp to 1.",
        )
        require(
            config.train.precision == "fp32",
            f"method.name galore is tested with fp32 parameters only, but train.precision is "
            f"{config.train.precision}: set it to fp32.",
        )
        require(galore.update_gap >= 1, f"method.galore.update_gap must be at least 1, not {galore.update_gap}.")
        require(
            math.isfinite(galore.scale) and galore.scale > 0,
            f"method.galore.scale must be positive, not {galore.scale}.",
        )


class Galore(Full):
    """Full-rank training in which each matrix has a projector."""

    def adapt(self, factors: Optional[dict[str, tuple[Tensor, Tensor]]]) -> None:
        if not next(self.model.parameters()).is_meta:  # a plan does without
            self.projector_class = load_projector()  # fails before any work if the package is missing

    @property
    def kinds(self) -> dict[str, str]:
        return {**super().kinds, "projector": "GaLore projectors, fp32"}

    def optimizer_state(self, param: nn.Parameter) -> dict[str, Tensor]:
        if any(param is matrix for matrix in self.matrices()):
            return projected_state(without_padding(param, param), self.config.method.rank)
        return super().optimizer_state(param)

    def build_optimizer(self) -> RowAdamW:
        method, optim = self.config.method, self.config.optim
        projectors = {
            matrix: self.projector_class(
                method.rank, update_proj_gap=method.galore.update_gap, scale=method.galore.scale, proj_type="std"
            )
            for matrix in self.matrices()
        }
        return GaloreAdamW(
            self.param_groups(), projectors, method.rank, beta1=optim.beta1, beta2=optim.beta2, eps=optim.eps
        )
