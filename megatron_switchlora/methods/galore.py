"""GaLore (arXiv 2403.03507): every weight trains, the decoder's matrices by Adam in a low-rank gradient space.

The groups are full-rank training's; only the optimizer differs (`optim/galore.py`). Not supported, and
refused before training: ZeRO 1 and 2 (flat partitions cut matrices anywhere), tensor parallelism (a rank has a
part of each gradient only) and bf16.
"""

from __future__ import annotations

from typing import Optional

from torch import Tensor

from megatron_switchlora.methods.full import Full
from megatron_switchlora.optim.galore import GaloreAdamW, load_projector
from megatron_switchlora.optim.row_adamw import RowAdamW


class Galore(Full):
    """Full-rank training whose matrices have a projector each."""

    def adapt(self, factors: Optional[dict[str, tuple[Tensor, Tensor]]]) -> None:
        self.projector_class = load_projector()  # refused before any work where the package is missing

    def build_optimizer(self) -> RowAdamW:
        method, optim = self.config.method, self.config.optim
        projectors = {
            matrix: self.projector_class(
                method.rank, update_proj_gap=method.galore_update_gap, scale=method.galore_scale, proj_type="std"
            )
            for matrix in self.matrices()
        }
        return GaloreAdamW(
            self.param_groups(), projectors, method.rank, beta1=optim.beta1, beta2=optim.beta2, eps=optim.eps
        )
