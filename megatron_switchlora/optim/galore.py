"""GaLore (arXiv 2403.03507): Adam in a low-rank space of each matrix's gradient; the weights stay full-rank.

Every `gap` steps the SVD of the gradient G of a matrix W (m, n) gives an orthonormal P, of the shorter side. This is
the package's projection type std:

    m >= n:  P [r, n], R = G P^T [m, r]        else  P [m, r], R = P^T G [r, n]

Both moments have R's shape. Adam's direction is projected back and scaled before it is subtracted.
W's padding is left out: singular vectors of a gradient without full rank could lie in it.

`galore_torch.GaLoreProjector` computes P. The Adam step is written out here, and equals the package's GaLoreAdamW to
rounding. So its state is plain tensors, saved by name like any other, and resumed to the bit. All other parameters use
the row-step AdamW. Masters must be whole fp32 matrices: DeepSpeed's fp32 stage 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Optional, Protocol

import torch
from torch import Tensor, nn

from megatron_switchlora.config.errors import UserError
from megatron_switchlora.distributed.shard import without_padding
from megatron_switchlora.distributed.slices import TensorSlice, parameter_slice, shard_slice
from megatron_switchlora.optim.layout import RowLayout
from megatron_switchlora.optim.row_adamw import RowAdamW, new_state

SAVED = ("exp_avg", "exp_avg_sq", "projector", "row_step")


class Projector(Protocol):
    """What this code uses of `GaLoreProjector`: it decomposes where `iter` is a multiple of its gap."""

    ortho_matrix: Optional[Tensor]

    def project(self, full_rank_grad: Tensor, iter: int) -> Tensor: ...

    def project_back(self, low_rank_grad: Tensor) -> Tensor: ...


def load_projector() -> Callable[..., Projector]:
    """Return the package's projector class.

    Raises:
        UserError: the package, or bitsandbytes which it imports, is missing or does not load.
    """
    try:
        from galore_torch.galore_projector import GaLoreProjector
    except Exception as error:  # bitsandbytes fails in many ways
        raise UserError(
            f"method.name galore needs the package galore-torch, which does not load here ({error}): pip install "
            "'megatron_switchlora[galore]' (from a checkout: pip install '.[galore]'), or use another method."
        ) from None
    return GaLoreProjector


def projected_shapes(shape: torch.Size, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the shapes of the projected gradient and of the projector of a matrix (m, n)."""
    m, n = shape
    return ((m, rank), (rank, n)) if m >= n else ((rank, n), (m, rank))


def projected_state(master: Tensor, rank: int) -> dict[str, Tensor]:
    """Return the state of a projected matrix before the first step."""
    low, projector = projected_shapes(master.shape, rank)
    # the counter stays on the host: it is read at every step
    return {
        "exp_avg": master.new_zeros(low),
        "exp_avg_sq": master.new_zeros(low),
        "projector": master.new_zeros(projector),
        "row_step": torch.zeros(1),
    }


class GaloreAdamW(RowAdamW):
    """Row-step AdamW, with rank `rank` GaLore for the matrices in `projectors`."""

    def __init__(
        self, groups: list[dict[str, Any]], projectors: dict[nn.Parameter, Projector], rank: int,
        *, beta1: float, beta2: float, eps: float,
    ) -> None:  # fmt: skip
        super().__init__(groups, beta1=beta1, beta2=beta2, eps=eps)
        self.projectors, self.rank = projectors, rank

    def _new_state(self, master: Tensor, rows: int) -> dict[str, Tensor]:
        if master not in self.projectors:
            return new_state(master, rows)
        return projected_state(without_padding(master, master), self.rank)

    def _has_blocks(self, master: Tensor) -> bool:
        return super()._has_blocks(master) and master not in self.projectors

    def _refused(self, layout: RowLayout) -> bool:
        return bool(super()._refused(layout))  # the counters of projected matrices are on the host, too

    def _update(self, masters: list[Tensor], group: dict[str, Any], refused: Optional[Tensor]) -> None:
        others = [master for master in masters if master not in self.projectors]
        if others:
            super()._update(others, group, refused)
        for master in masters:
            if master in self.projectors:
                self._update_projected(master, self.projectors[master], group)  # type: ignore[index]

    def _update_projected(self, master: Tensor, projector: Projector, group: dict[str, Any]) -> None:
        assert master.grad is not None
        factors = self.head_clip.factors(master.dtype) if self.head_clip is not None else None
        if factors is not None:
            master.grad.mul_(factors[0])
        state, lr = self.state[master], group["lr"]
        projector.ortho_matrix = state["projector"]
        grad = projector.project(without_padding(master, master.grad), int(state["row_step"]))
        if projector.ortho_matrix is not state["projector"]:  # decomposed again
            state["projector"].copy_(projector.ortho_matrix)
            projector.ortho_matrix = state["projector"]
        state["row_step"] += 1
        step, (beta1, beta2) = int(state["row_step"]), self.betas
        exp_avg = state["exp_avg"].lerp_(grad, 1 - beta1)
        exp_avg_sq = state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        # as in the package: eps is added before the bias correction, and the decay comes last
        direction = projector.project_back(exp_avg / exp_avg_sq.sqrt().add_(self.eps))
        without_padding(master, master).add_(direction, alpha=-lr * (1 - beta2**step) ** 0.5 / (1 - beta1**step))
        if group["weight_decay"] != 0:
            master.mul_(1 - lr * group["weight_decay"])

    def slices(self, name: str, param: nn.Parameter, group: Optional[str]) -> Iterator[TensorSlice]:
        """Of a projected matrix: itself, and NAME:exp_avg, NAME:exp_avg_sq, NAME:projector, NAME:row_step."""
        if param not in self.projectors:
            yield from super().slices(name, param, group)
            return
        yield parameter_slice(name, param, group)
        for key in SAVED:
            yield shard_slice(f"{name}:{key}", self.state[param][key], [], group)

    def read_rows(self, param: nn.Parameter) -> dict[str, Tensor]:
        """Of a projected matrix: master and row_step alone, its moments have another shape."""
        if param not in self.projectors:
            return super().read_rows(param)
        return {"master": param.detach().cpu().clone(), "row_step": self.state[param]["row_step"].clone()}
