"""Train LoRA: a fixed low-rank adapter on the seven projections of every layer, while W stays frozen.

Embedding, output layer and norms train as full tensors. With LoRA+ B has its own learning rate.

Initial values:
    switchlora, pissa, lora_ga    B is not zero, so W <- W0 - s B A keeps the function of the dense initialisation
    classic, semi_orthogonal      B = 0 (semi_orthogonal is LTE's)
LoRA-GA's initial factors A_0 and B_0 stay in host memory and in checkpoints. The base of such a run is
W0 = W + s B_0 A_0. Over this base the adapter is [B, -B_0] [A; A_0], of rank 2r (arXiv 2407.05000, section 3).

Each LTE head draws its values from its own seed. Head 0 draws the same values as LoRA.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Optional

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_switchlora.config.method import register
from megatron_switchlora.config.run import RunConfig, accumulation_steps
from megatron_switchlora.distributed.collectives import from_first
from megatron_switchlora.distributed.consensus import await_all
from megatron_switchlora.distributed.shard import named_generator, shard_of
from megatron_switchlora.distributed.slices import TensorSlice, parameter_slice, replica_group, shard_slice
from megatron_switchlora.lowrank.init import Side, draw_orthogonal, draw_vectors, factor_std, principal_factors
from megatron_switchlora.lowrank.linear import LowRankLinear
from megatron_switchlora.lowrank.merged import choose_form
from megatron_switchlora.lowrank.nf4 import bitsandbytes_works
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
    reads = AdapterFacts.reads | {"base_precision"}
    inits = ALL_INITS

    @property
    def kind(self) -> type[Method]:
        return QuantisedLora if self.quantised else Lora

    @property
    def quantised(self) -> bool:
        return self.method.base_precision == "nf4"

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
        self._subtract_products()
        self.renew_weights()

    def _subtract_products(self) -> None:
        """Set W <- W - s B A, so that the first step computes the initial weights."""
        if self.config.method.initial == "pissa":
            self._take_principal_factors()
        for linear in self.linears.values():
            linear.add_product(-1.0)

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


class QuantisedLora(Lora):
    """Drive LoRA over a frozen W in 4 bits, as QLoRA does (arXiv 2305.14314): in the split form.

    Nothing is folded into W after the start.
    """

    def start(self, optimizer: RowAdamW) -> None:
        """Subtract the initial product from W in fp32, and then quantise W layer by layer.

        So the rounding to 4 bits is the only difference from LoRA's start.
        """
        self.optimizer = optimizer
        self._subtract_products()
        Method.start(self, optimizer)

    def allocate(self) -> None:
        super().allocate()
        device = next(self.model.parameters()).device
        kernels = device.type != "meta" and bitsandbytes_works(device)
        for linear in self.linears.values():
            linear.quantise(kernels)

    @property
    def kinds(self) -> dict[str, str]:
        return {**super().kinds, **dict.fromkeys(("nf4_codes", "nf4_scales"), "frozen W, 4 bit")}

    def _bases(self) -> Iterator[tuple[str, LowRankLinear, Tensor]]:
        """Yield (name, layer, tensor) of what holds each W: NAME.nf4_codes and NAME.nf4_scales."""
        for name, linear in self.linears.items():
            assert linear.quantised is not None, "W is quantised at the start"
            for short, tensor in linear.quantised.tensors().items():
                yield f"{name}.{short}", linear, tensor

    def slices(self) -> Iterator[TensorSlice]:
        """Add the base in 4 bits."""
        yield from super().slices()
        for name, linear, tensor in self._bases():
            assert linear.quantised is not None
            yield shard_slice(name, tensor, [linear.quantised.split_of(tensor, linear.split)], "dp")

    def replicas(self) -> Iterator[Replica]:
        yield from super().replicas()
        for name, _, tensor in self._bases():
            yield Replica(name, tensor, "dp")
