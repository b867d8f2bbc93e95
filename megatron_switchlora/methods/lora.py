"""Train LoRA: a fixed low-rank adapter on the seven projections of every layer, while W stays frozen.

Embedding, output layer and norms train as full tensors. With LoRA+ B has its own learning rate.

Initial values:
    switchlora, pissa, lora_ga    B is not zero, so W <- W0 - s B A keeps the function of the dense initialisation
    classic, semi_orthogonal      B = 0 (semi_orthogonal is LTE's)
LoRA-GA's initial factors A_0 and B_0 stay in host memory and in checkpoints. The base of such a run is
W0 = W + s B_0 A_0. Over this base the adapter is [B, -B_0] [A; A_0], of rank 2r (arXiv 2407.05000, section 3).

Each LTE head draws its values from its own seed. Head 0 draws the same values as LoRA. `MhLora` is multi-head LoRA,
LTE's baseline: y = W x + (s/N) sum_n B_n A_n x (arXiv 2402.16828, section 3.1). It equals LoRA with the vectors of N
heads side by side.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Optional

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_switchlora.config.errors import require
from megatron_switchlora.config.facts import option
from megatron_switchlora.config.method import register
from megatron_switchlora.config.run import RunConfig, accumulation_steps
from megatron_switchlora.distributed.collectives import from_first
from megatron_switchlora.distributed.consensus import await_all
from megatron_switchlora.distributed.shard import named_generator, shard_of
from megatron_switchlora.distributed.slices import TensorSlice, parameter_slice, replica_group
from megatron_switchlora.lowrank.init import Side, draw_orthogonal, draw_vectors, factor_std, principal_factors
from megatron_switchlora.lowrank.linear import LowRankLinear
from megatron_switchlora.lowrank.merged import choose_form
from megatron_switchlora.lowrank.rows import in_row_order
from megatron_switchlora.lowrank.spread import wait_for
from megatron_switchlora.methods.adapter_options import AdapterFacts
from megatron_switchlora.methods.base import Flow, Method, Replica, host_copy
from megatron_switchlora.optim.row_adamw import RowAdamW
from megatron_switchlora.startup.progress import progress


def head_seed(seed: int, head: int) -> int:
    """Return the seed of an LTE head's random values; head 0 uses the run's seed."""
    return seed if head == 0 else named_generator(seed, f"head {head}").initial_seed()


def draw_factor(config: RunConfig, side: Side, name: str, shape: tuple[int, int], count: int, head: int = 0) -> Tensor:
    """Draw `count` initial vectors [count, length] of one side of a layer, for an LTE head.

    `shape` is the layer's full (m, n). The values depend on the layer's `name` and not on the mesh. They are fp32, on
    the CPU.
    """
    method, length = config.method, shape[1] if side == "A" else shape[0]
    generator = named_generator(head_seed(config.train.seed, head), f"{name}.lora_{side}")
    if side == "A" and method.initial == "semi_orthogonal":
        return draw_orthogonal(count, length, method.orthogonal_scale, generator)
    return draw_vectors(count, length, factor_std(side, method.initial, *shape, method.rank), generator)


def part_sides(
    groups: list[dict[str, Any]], pairs: list[tuple[nn.Parameter, nn.Parameter]], ratio: float
) -> list[dict[str, Any]]:
    """Split the first group, the adapters' (A, B) `pairs`, into one group per side for LoRA+.

    B's learning rate is `ratio` times A's. A ratio of 1 leaves the groups as they are.
    """
    if ratio == 1:
        return groups
    adapters, *others = groups
    A, B = (in_row_order(side) for side in zip(*pairs, strict=True))
    faster = {**adapters, "name": "lora_B", "params": B, "base_lr": adapters["base_lr"] * ratio}
    return [{**adapters, "name": "lora_A", "params": A}, faster, *others]


ALL_INITS = frozenset({"switchlora", "classic", "pissa", "lora_ga", "semi_orthogonal"})


@register
class LoraFacts(AdapterFacts):
    """Facts of LoRA: an adapter whose vectors stay in place."""

    name = "lora"
    about = "a fixed low-rank adapter"
    inits = ALL_INITS

    @property
    def kind(self) -> type[Method]:
        return Lora

    @property
    def keeps_initial(self) -> bool:
        return self.method.init == "lora_ga"


class Lora(Method):
    """Drive LoRA.

    `linears` holds the adapted layers by Hugging Face name, in layer order. `initial` holds the initial factors, as the
    forward pass used them, if the method keeps them.
    """

    def adapt(self, factors: Optional[dict[str, tuple[Tensor, Tensor]]]) -> None:
        self.initial: dict[nn.Parameter, Tensor] = {}
        method = self.config.method
        form = choose_form(self.config)
        micro_batches = accumulation_steps(self.config, self.mesh.size("dp"))
        over = None if method.base_spread == "none" else self.mesh.axis(method.base_spread)
        self.linears: dict[str, LowRankLinear] = {}
        for name, parent, attribute, base in self.model.decoder_linears():
            linear = LowRankLinear(base, method.adapter_rank, method.scaling, form, micro_batches, over)
            setattr(parent, attribute, linear)
            self.linears[name] = linear
        self._draw_factors()
        if self.config.method.init == "lora_ga":
            self._take_factors(factors or {})

    def _draw_vectors(self, side: Side, name: str, count: int) -> Tensor:
        """Draw `count` vectors [count, length] of one side of the layer."""
        linear = self.linears[name]
        return draw_factor(
            self.config, side, name, (linear.out_features, linear.in_features), count, self.mesh.rank("lte")
        )

    def _draw_factors(self) -> None:
        for name, linear in self.linears.items():
            self._fill_factor(linear.lora_A, self._draw_vectors("A", name, self.config.method.rank))
            self._fill_factor(linear.lora_B, self._draw_vectors("B", name, self.config.method.rank))

    def _take_factors(self, factors: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Copy this rank's shards of the given factors into A and B.

        Without factors A and B are zero until a checkpoint fills them.
        """
        for name, linear in self.linears.items():
            A, B = factors[name] if factors else (torch.zeros(()), torch.zeros(()))
            linear.lora_A.data.copy_(A)
            linear.lora_B.data.copy_(B)

    @staticmethod
    def _fill_factor(factor: nn.Parameter, full: Tensor) -> None:
        factor.data.copy_(shard_of(factor, full))

    def matrices(self) -> list[nn.Parameter]:
        return in_row_order(x for linear in self.linears.values() for x in (linear.lora_A, linear.lora_B))

    def param_groups(self) -> list[dict[str, Any]]:
        """Return the groups; with a LoRA+ ratio the adapters form two.

        ZeRO partitions the flat buffer of each group, so two groups would change the layout of a run without a ratio.
        """
        pairs = [(linear.lora_A, linear.lora_B) for linear in self.linears.values()]
        return part_sides(super().param_groups(), pairs, self.config.optim.lora_plus_ratio)

    def start(self, optimizer: RowAdamW) -> None:
        super().start(optimizer)
        if self.config.method.initial == "pissa":
            self._take_principal_factors()
        for linear in self.linears.values():
            linear.add_product(-1.0)
        self.renew_weights()

    def allocate(self) -> None:
        super().allocate()
        for linear in self.linears.values():
            linear.place_merged()
        if self.config.method.facts.keeps_initial:
            pairs = ((x.weight.dtype, factor) for x in self.linears.values() for factor in (x.lora_A, x.lora_B))
            self.initial = {factor: host_copy(factor, dtype) for dtype, factor in pairs}

    def buffer_group(self, module: nn.Module) -> Optional[str]:
        if getattr(module, "owned", None) is None:
            return super().buffer_group(module)
        return "across" if self.config.method.base_spread == "node" else None

    def flows(self, partitioned: bool) -> Iterator[tuple[Flow, float]]:
        """Yield also the rows of W_eff that this rank gives where W's are spread."""
        yield from super().flows(partitioned)
        gathered = [linear.gathered.own.nbytes for linear in self.linears.values() if linear.gathered is not None]
        if gathered:
            yield Flow("base", "matrices", self.config.method.base_spread, "all_gather", sum(gathered)), 1.0

    @property
    def kinds(self) -> dict[str, str]:
        return {**super().kinds, **dict.fromkeys(("lora_A_0", "lora_B_0"), "LoRA-GA's A_0 and B_0, in host memory")}

    def _kept(self) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
        """Yield (name, factor, initial value) of the initial factors that are kept."""
        for name, linear in self.linears.items():
            for side, factor in (("A", linear.lora_A), ("B", linear.lora_B)):
                if factor in self.initial:
                    yield f"{name}.lora_{side}_0", factor, self.initial[factor]

    def slices(self) -> Iterator[TensorSlice]:
        """Add the initial factors that are kept: NAME.lora_A_0 [r, in] and NAME.lora_B_0 [r, out]."""
        yield from super().slices()
        for name, factor, value in self._kept():
            yield parameter_slice(name, factor, replica_group(factor), value)

    def replicas(self) -> Iterator[Replica]:
        yield from super().replicas()
        for name, linear in self.linears.items():
            if linear.gathered is not None:
                yield Replica(f"{name}.gathered", linear.gathered.whole, "dp")
        for name, factor, value in self._kept():
            yield Replica(name, value, replica_group(factor))

    def _take_principal_factors(self) -> None:
        """Set A and B to PiSSA's factors. Collective over the head.

        Each data-parallel rank decomposes its share of the layers and broadcasts the factors. Tensor-parallel ranks
        gather the same W and take the first one's factors.
        """
        dp, linears = self.mesh.axis("dp"), list(self.linears.values())
        for first in progress(range(0, len(linears), dp.size), "PiSSA's decomposition", "rounds"):
            own = self._whole_of_round(linears[first : first + dp.size], dp.rank)
            if own is not None:
                linear, full_weight = own
                A, B = from_first(self.mesh.axis("tp"), *principal_factors(full_weight, linear.rank, linear.scaling))
                self._fill_factor(linear.lora_A, A)
                self._fill_factor(linear.lora_B, B)
            if linears[first].owned is not None and dp.size > 1:
                await_all()  # before the next exchange, as a decomposition may take longer than a collective waits
        if dp.size > 1:
            await_all()
        for number, linear in enumerate(self.linears.values()):
            for factor in (linear.lora_A, linear.lora_B):
                if dp.size > 1:
                    dist.broadcast(factor.data, group=dp.group, group_src=number % dp.size)
                self.optimizer.rows_rewritten(factor)

    @staticmethod
    def _whole_of_round(linears: list[LowRankLinear], place: int) -> Optional[tuple[LowRankLinear, Tensor]]:
        """Return the linear at a place and its full W; None if there is none. Collective where rows are spread."""
        own = None
        for number, linear in enumerate(linears):
            if number == place or linear.owned is not None:
                rows = linear.whole_weight()
                own = (linear, linear.split.gather(rows)) if number == place else own
        return own

    def before_step(self, step: int) -> int:
        self._forget_merged()  # before gradients in fp32 need the memory
        return 0

    def after_step(self, step: int) -> None:
        self._forget_merged()

    def loaded(self) -> None:
        self._forget_merged()
        self.renew_weights()

    def _forget_merged(self) -> None:
        for linear in self.linears.values():
            linear.forget_merged()

    def renew_weights(self) -> None:
        wait_for([linear.gather_merged() for linear in self.linears.values() if linear.owned is not None])


@dataclass
class MhLoraOptions:
    """Multi-head LoRA, LTE's baseline (arXiv 2402.16828, section 3.1), with method.name mhlora."""

    heads: int = option(1)
    """LoRA heads whose sum is the adapter of one model."""


@register
class MhLoraFacts(AdapterFacts):
    """Facts of multi-head LoRA: heads side by side."""

    name = "mhlora"
    about = "the sum of several LoRA heads in one model"
    sections = {"mhlora": MhLoraOptions}  # noqa: RUF012
    inits = frozenset({"switchlora", "classic", "semi_orthogonal"})

    @property
    def kind(self) -> type[Method]:
        return MhLora

    @property
    def default_init(self) -> str:
        return "semi_orthogonal"

    @property
    def default_alpha(self) -> float:
        return 4096.0 if self.method.initial in ("semi_orthogonal", "classic") else 1.0

    @property
    def default_lr(self) -> float:
        """LTE's rate at LTE's large s; LoRA's rate where B is not zero and s = 1 / rank."""
        return 0.00005 if self.default_alpha > 1 else super().default_lr

    def default_dense_lr(self, lr: float) -> float:
        return 0.001

    @property
    def side_by_side(self) -> int:
        return self.method.mhlora.heads

    def check(self, config: RunConfig) -> None:
        heads = config.method.mhlora.heads
        require(heads >= 1, f"method.mhlora.heads must be at least 1, not {heads}.")
        super().check(config)


class MhLora(Lora):
    """Multi-head LoRA: `method.mhlora.heads` heads side by side in one adapter."""

    def _draw_vectors(self, side: Side, name: str, count: int) -> Tensor:
        linear = self.linears[name]
        shape = (linear.out_features, linear.in_features)
        heads = range(self.config.method.mhlora.heads)
        drawn = [draw_factor(self.config, side, name, shape, count, head) for head in heads]
        joined = drawn[0].new_empty(len(drawn), *drawn[0].shape)  # torch.cat is slow on the meta device
        for place, vectors in zip(joined, drawn, strict=True):
            place.copy_(vectors)
        return joined.flatten(0, 1)
