"""LoRA: a fixed low-rank adapter on the seven projections of every layer; W stays frozen.

Initial values are SwitchLoRA's or LoRA-GA's (then W <- W0 - sBA, so that step 0 computes the dense
initialisation), or the classic ones (B = 0). Embedding, head and norms train dense. LoRA-GA's initial
factors, A_0 and B_0, stay in host memory and in checkpoints: W0 = W + s B_0 A_0 is the base that a run
began from, over which its adapter is [B, -B_0] [A; A_0], of rank 2r (arXiv 2407.05000, section 3).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Optional

import torch
from torch import Tensor, nn

from megatron_switchlora.config import RunConfig, accumulation_steps
from megatron_switchlora.lowrank.init import Side, draw_vectors, factor_std
from megatron_switchlora.lowrank.linear import LowRankLinear
from megatron_switchlora.methods.base import Method, Replica
from megatron_switchlora.model.llama import LlamaForCausalLM, decoder_linears
from megatron_switchlora.optim.row_adamw import RowAdamW
from megatron_switchlora.parallel.mesh import Mesh
from megatron_switchlora.parallel.parts import Part, shard_part
from megatron_switchlora.parallel.shard import is_split, named_generator, shard_of


class Lora(Method):
    """`linears` are the adapted layers by Hugging Face name, in layer order; `initial` the factors of the start, as the
    forward pass used them, where they are kept."""

    def __init__(
        self,
        config: RunConfig,
        model: LlamaForCausalLM,
        mesh: Mesh,
        factors: Optional[dict[str, tuple[Tensor, Tensor]]] = None,
    ) -> None:
        super().__init__(config, model, mesh)
        self.initial: dict[nn.Parameter, Tensor] = {}
        micro_batches = accumulation_steps(config.train, mesh.size("dp"))
        self.linears: dict[str, LowRankLinear] = {}
        for name, parent, attribute, base in list(decoder_linears(model)):
            linear = LowRankLinear(base, config.method, micro_batches)
            setattr(parent, attribute, linear)
            self.linears[name] = linear
        self._draw_factors()
        if config.method.init == "lora_ga":
            self._take_factors(factors or {})

    def _draw_vectors(self, side: Side, name: str, count: int) -> Tensor:
        """`count` vectors of the layer's side [count, length], drawn for the full tensor by name."""
        linear = self.linears[name]
        m, n = linear.out_features, linear.in_features
        std = factor_std(side, self.config.method.init, m, n, linear.rank)
        generator = named_generator(self.config.train.seed, f"{name}.lora_{side}")
        return draw_vectors(count, n if side == "A" else m, std, generator)

    def _draw_factors(self) -> None:
        for name, linear in self.linears.items():
            self._fill_factor(linear.lora_A, self._draw_vectors("A", name, linear.rank))
            self._fill_factor(linear.lora_B, self._draw_vectors("B", name, linear.rank))

    def _take_factors(self, factors: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Let A and B be this rank's parts of those found; without any they are zero, for a checkpoint to fill."""
        for name, linear in self.linears.items():
            A, B = factors[name] if factors else (torch.zeros(()), torch.zeros(()))
            linear.lora_A.data.copy_(A)
            linear.lora_B.data.copy_(B)

    @staticmethod
    def _fill_factor(factor: nn.Parameter, full: Tensor) -> None:
        factor.data.copy_(shard_of(factor, full))

    def matrices(self) -> list[nn.Parameter]:
        return [factor for linear in self.linears.values() for factor in (linear.lora_A, linear.lora_B)]

    def start(self, optimizer: RowAdamW) -> None:
        super().start(optimizer)
        for linear in self.linears.values():
            linear.add_product(-1.0)
        if self.config.method.keeps_initial:
            dtypes = {
                factor: linear.weight.dtype
                for linear in self.linears.values()
                for factor in (linear.lora_A, linear.lora_B)
            }
            self.initial = {factor: factor.detach().to("cpu", dtype, copy=True) for factor, dtype in dtypes.items()}

    def _kept(self) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
        """(name, factor, its initial value) of what is kept of the start."""
        for name, linear in self.linears.items():
            for side, factor in (("A", linear.lora_A), ("B", linear.lora_B)):
                if factor in self.initial:
                    yield f"{name}.lora_{side}_0", factor, self.initial[factor]

    def parts(self) -> Iterator[Part]:
        """Also A_0 [r, in] and B_0 [r, out], NAME.lora_A_0 and NAME.lora_B_0, where they are kept."""
        yield from super().parts()
        for name, factor, value in self._kept():
            shard = filter(None, [factor.shard])  # type: ignore[attr-defined]
            yield shard_part(name, value, shard, "dp" if is_split(factor) else "head")

    def replicas(self) -> Iterator[Replica]:
        yield from super().replicas()
        for name, factor, value in self._kept():
            yield Replica(name, value, "dp" if is_split(factor) else "head")

    def after_step(self, step: int) -> None:
        self._forget_merged()

    def loaded(self) -> None:
        self._forget_merged()

    def _forget_merged(self) -> None:
        for linear in self.linears.values():
            linear.forget_merged()
