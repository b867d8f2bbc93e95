"""Train the heads of LTE, LoRA-the-Explorer (arXiv 2402.16828), and merge them every T steps.

Head n has its own A_n, B_n, dense tensors, samples and optimizer state: y = W x + s B_n A_n x. A merge forms the mean
effective weight M = mean_n (W_n + s B_n A_n) of each layer, and the mean of each dense tensor. It has two forms:
    reset        W <- M and B_n <- 0; A_n (unless re-initialised) and the Adam states of A_n and B_n stay (Algorithm 1)
    reset-less   W_n <- M - s B_n A_n: nothing is zeroed, and each head's function becomes the mean (the default)
Let A'_n and B'_n be the factors at the last merge. Without switches W_n + s B'_n A'_n is the same for all heads. So in
the reset-less form the origin O = M - (s/N) sum_n B_n A_n never changes. It is kept in host memory, once per head. A
merge then needs only the present factors, and rounding errors do not add up over merges.
    Lte             a head on ranks of its own
    LteSwitchLora   the same with switches inside, which change W_n
    LocalLte        K heads that share a process and its base
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from typing import Any, Optional

import torch
from torch import Tensor, nn

from megatron_switchlora.distributed.head_names import of_head
from megatron_switchlora.distributed.precision import at_least_fp32
from megatron_switchlora.distributed.shard import is_split, shard_of
from megatron_switchlora.distributed.slices import TensorSlice, parameter_slice, replica_group, shard_slice
from megatron_switchlora.lowrank.heads import HeadsLinear
from megatron_switchlora.lowrank.nf4 import bitsandbytes_works
from megatron_switchlora.lowrank.rows import in_row_order
from megatron_switchlora.methods.base import Flow, Method, Replica
from megatron_switchlora.methods.lora import Lora, draw_factor, part_sides
from megatron_switchlora.methods.lte import options as options  # registers LTE
from megatron_switchlora.methods.lte.merging import mean_dense, mean_matrices, mean_products, merge_sends_factors
from megatron_switchlora.methods.lte.origins import Origin, uploaded
from megatron_switchlora.methods.switchlora import SwitchLora
from megatron_switchlora.model.heads import split_dense_tensors
from megatron_switchlora.model.protocol import LanguageModel, build_model
from megatron_switchlora.optim.row_adamw import RowAdamW


class Merging(Method):
    """What all kinds of heads share, a mixin that stands before the inner method's class.

    `linears` holds the adapted layers.
    """

    linears: dict[str, Any]
    origins: dict[str, Origin]

    @property
    def first_head(self) -> int:
        return self.mesh.heads(self.config.method.facts.heads_here).start

    def merges_after(self, steps: int) -> bool:
        """Return whether heads are merged after `steps` steps."""
        interval = self.config.method.facts.merge_interval
        return interval is not None and steps > 0 and steps % interval == 0

    def after_step(self, step: int) -> None:
        super().after_step(step)
        if self.merges_after(step + 1):
            self.merge(step)

    @torch.no_grad()
    def merge(self, step: int) -> None:
        """Merge all heads. Collective over the world."""
        for (name, linear), mean in zip(self.linears.items(), self.mean_weights(), strict=True):
            self._adopt(name, linear, mean)
            if not self.config.method.facts.resetless:
                self._restart(name, linear, step)
        dense = self.dense()
        for name, mean in self._mean_dense(dense):
            for param in dense[name]:
                self.optimizer.set_values(param, mean)

    def mean_weights(self) -> Iterator[Tensor]:
        """Yield this rank's shard of each layer's mean effective weight, in at least fp32. Collective."""
        rows = uploaded(self.origins.values(), next(self.model.parameters()).device)
        for name, linear, mean in self._mean_products():
            yield self.origins[name].plus(mean, next(rows)) if self.origins else mean.add_(linear.weight)

    def allocate(self) -> None:
        """Take W as the origin, from which nothing is subtracted yet."""
        dp, keeps = self.mesh.axis("dp"), self.config.method.facts.keeps_origins
        self.origins = {name: Origin(x.weight, dp) for name, x in self.linears.items()} if keeps else {}
        super().allocate()

    def start(self, optimizer: RowAdamW) -> None:
        """Begin from M = W, so that the origin is W - (s/N) sum_n B_n A_n."""
        super().start(optimizer)
        for name, _, product in self._mean_products() if self.origins else ():
            self.origins[name].subtract(product)

    @property
    def kinds(self) -> dict[str, str]:
        return {**super().kinds, "origin": "origins of the LTE heads, in host memory"}

    def flows(self, partitioned: bool) -> Iterator[tuple[Flow, float]]:
        """Yield also a merge: factors or products, the rows of the origins, and the means of dense tensors."""
        yield from super().flows(partitioned)
        every, sums = self.config.method.facts.merge_interval or math.inf, {"all_gather": 0, "all_reduce": 0}
        for linear in self.linears.values():
            pairs = self._pairs(linear)
            n, m = (factor.size(1) for factor in pairs[0])
            if merge_sends_factors(self.config, m, n):
                sums["all_gather"] += sum(A.nbytes + B.nbytes for A, B in pairs)
            else:
                sums["all_reduce"] += 4 * m * n
        for op, given in sums.items():
            yield Flow("merges", "adapters", "lte", op, given), every
        yield Flow("merges", "matrices", "dp", "all_gather", sum(o.rows.nbytes for o in self.origins.values())), every
        dense = sum(4 * params[0].numel() for params in self.dense().values())  # the heads here are summed first
        yield Flow("merges", "dense", "data" if partitioned else "lte", "all_reduce", dense), every

    def _adopt(self, name: str, linear: Any, mean: Tensor) -> None:
        """Give all heads of a layer the effective weight `mean`."""
        raise TypeError("each kind of heads must implement _adopt")

    def _restart(self, name: str, linear: Any, step: int) -> None:
        """Zero B in parameter and master; with `redraw_A`, re-initialise A too."""
        for head, (A, B) in enumerate(self._pairs(linear)):
            B.data.zero_()
            self.optimizer.rows_rewritten(B)
            if self.config.method.lte.redraw_A:
                shape = (linear.out_features, linear.in_features)
                drawn = f"{name}, merge after step {step + 1}"
                full = draw_factor(self.config, "A", drawn, shape, A.size(0), self.first_head + head)
                A.data.copy_(shard_of(A, full))
                self.optimizer.rows_rewritten(A)

    def _pairs(self, linear: Any) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """Return (A, B) of each head here."""
        return [(linear.lora_A, linear.lora_B)]

    def dense(self) -> dict[str, list[nn.Parameter]]:
        """Return the trainable dense parameters by Hugging Face name, one for each head here."""
        factor_ids = {id(param) for param in self.matrices()}
        dense: dict[str, list[nn.Parameter]] = {}
        for name, param in self.model.named_parameters():
            if id(param) not in factor_ids and param.requires_grad:
                dense.setdefault(self.stored_name(name).split("/", 1)[1], []).append(param)
        return dense

    def frozen_dense(self) -> dict[str, nn.Parameter]:
        """Return the frozen embedding, output layer and norms by Hugging Face name, which all heads share."""
        return {name: param for name, param in self.model.named_parameters() if not param.requires_grad}

    def frozen_group(self, param: nn.Parameter) -> str:
        return "data" if is_split(param) else "world"

    def _mean_dense(self, dense: dict[str, list[nn.Parameter]]) -> Iterator[tuple[str, Tensor]]:
        lte, data = self.mesh.axis("lte"), self.mesh.axis("data")
        return mean_dense(dense, self.optimizer, self.config.heads, lte, data)

    def _mean_products(self) -> Iterator[tuple[str, Any, Tensor]]:
        """Yield (name, layer, (s/N) sum_n B_n A_n) of each adapted layer. Collective."""
        products = mean_products(list(self.linears.values()), self.config, self.mesh.axis("lte"))
        for (name, linear), product in zip(self.linears.items(), products, strict=True):
            yield name, linear, product

    @torch.no_grad()
    def evaluated(self, exported: bool = False) -> LanguageModel:
        """Return the mean effective model, with plain linears, or with one head that head's own model. Collective.

        For evaluation it is in the precision of compute. For export it is in fp32: matrices as the folding gives them,
        dense tensors rounded as the forward pass sees them.
        """
        if self.config.heads == 1 and not self.config.method.facts.shares_base:
            return self.model
        reference = next(self.model.parameters())
        with torch.device(reference.device):
            model = build_model(self.config.model, self.model.vocab_size, self.mesh.axis("tp"))
        model.to(at_least_fp32(reference.dtype) if exported else reference.dtype)
        targets = dict(model.named_parameters())
        matrices = zip((f"{name}.weight" for name in self.linears), self.mean_weights(), strict=True)
        dense = ((name, mean.to(reference.dtype)) for name, mean in self._mean_dense(self.dense()))
        for name, mean in chain(matrices, dense, self.frozen_dense().items()):
            targets[name].copy_(mean)
        return model

    def set_mean(self, name: str, mean: Tensor) -> None:
        """Store this rank's shard of a layer's mean effective weight, from which `regrouped` computes."""
        if self.config.method.facts.quantised:
            self.origins[name].store(mean)
        else:
            self.linears[name].weight.copy_(mean)

    @torch.no_grad()
    def regrouped(self) -> None:
        """Recompute origins and each W from the means of `set_mean`, for another number of heads. Collective."""
        for name, linear, product in self._mean_products():
            in_origin = self.config.method.facts.quantised
            mean = self.origins[name].plus(torch.zeros_like(product)) if in_origin else linear.weight.clone()
            self._adopt(name, linear, mean)
            if name in self.origins:
                self.origins[name].store(mean - product)

    def stored_name(self, name: str) -> str:
        return of_head(self.first_head, name)

    def replicas(self) -> Iterator[Replica]:
        """Add the origins, which are equal over heads; a head's data ranks hold different rows."""
        yield from super().replicas()
        for name, origin in self.origins.items():
            yield Replica(f"{name}.origin", origin.rows, "lte")

    def _origin_slices(self) -> Iterator[TensorSlice]:
        for name, origin in self.origins.items():
            yield shard_slice(f"{name}.origin", origin.rows, [origin.split, self.linears[name].split], "lte")


class HeadOnRanks(Merging):
    """A head whose ranks hold their own W, into which the last merge is folded."""

    def _adopt(self, name: str, linear: Any, mean: Tensor) -> None:
        linear.weight.copy_(mean)
        if self.config.method.facts.resetless:
            linear.add_product(-1.0)
        linear.forget_merged()

    def slices(self) -> Iterator[TensorSlice]:
        """Yield a head's own tensors as head_NN/NAME, and shared ones as NAME: the origin, and W on reset."""
        for held in super().slices():
            if not self.config.method.facts.resetless and held.name.endswith(".weight"):
                yield replace(held, group="data")
            else:
                yield replace(held, name=self.stored_name(held.name))
        yield from self._origin_slices()

    def replicas(self) -> Iterator[Replica]:
        """Add W over all heads where merges reset, as all heads then have the same W."""
        yield from super().replicas()
        if not self.config.method.facts.resetless:
            for name, linear in self.linears.items():
                yield Replica(f"{name}.weight", linear.weight, "data")


class Lte(HeadOnRanks, Lora):
    """A LoRA head on ranks of its own."""


class LteSwitchLora(HeadOnRanks, SwitchLora):
    """A SwitchLoRA head on ranks of its own, with its own bank and schedule.

    The merge is reset-less. Switches change W_n but keep E_n = W_n + s B_n A_n, so the heads have no common origin. The
    merge averages the E_n themselves.
    """

    def mean_weights(self) -> Iterator[Tensor]:
        return mean_matrices(list(self.linears.values()), self.config.heads, self.mesh.axis("lte"))


class LocalLte(Merging):
    """K heads in one process, or heads over a quantised base."""

    def adapt(self, factors: Optional[dict[str, tuple[Tensor, Tensor]]]) -> None:
        self.linears = {}
        method, facts = self.config.method, self.config.method.facts
        for name, parent, attribute, base in self.model.decoder_linears():
            linear = HeadsLinear(base, facts.heads_here, method.rank, method.scaling, facts.resetless)
            setattr(parent, attribute, linear)
            self.linears[name] = linear
            if self.config.method.init == "lora_ga":
                self._take_factors(linear, factors[name] if factors else None)
            else:
                self._draw_factors(name, linear)
        if self.config.freezes_dense:
            self.model.heads = facts.heads_here  # all heads use the same dense tensors
        else:
            split_dense_tensors(self.model, facts.heads_here)

    def _draw_factors(self, name: str, linear: HeadsLinear) -> None:
        shape = (linear.out_features, linear.in_features)
        for head, (A, B) in enumerate(self._pairs(linear), self.first_head):
            A.data.copy_(shard_of(A, draw_factor(self.config, "A", name, shape, linear.rank, head)))
            B.data.copy_(shard_of(B, draw_factor(self.config, "B", name, shape, linear.rank, head)))

    def _take_factors(self, linear: HeadsLinear, factors: Optional[tuple[Tensor, Tensor]]) -> None:
        """Split the given factors over the heads here; without any they are zero until a checkpoint fills them."""
        for head, pair in enumerate(self._pairs(linear)):
            for side, factor in enumerate(pair):
                factor.data.copy_(factors[side].chunk(linear.heads)[head] if factors else torch.zeros(()))

    def _pairs(self, linear: HeadsLinear) -> list[tuple[nn.Parameter, nn.Parameter]]:
        return list(zip(linear.lora_A, linear.lora_B, strict=True))

    def matrices(self) -> list[nn.Parameter]:
        return in_row_order(x for linear in self.linears.values() for pair in self._pairs(linear) for x in pair)

    def param_groups(self) -> list[dict[str, Any]]:
        pairs = [pair for linear in self.linears.values() for pair in self._pairs(linear)]
        return part_sides(super().param_groups(), pairs, self.config.optim.lora_plus_ratio)

    def allocate(self) -> None:
        super().allocate()
        quantised, device = self.config.method.facts.quantised, next(self.model.parameters()).device
        kernels = quantised and device.type != "meta" and bitsandbytes_works(device)
        for linear in self.linears.values():
            linear.place()
            if quantised:
                linear.quantise(kernels)

    def start(self, optimizer: RowAdamW) -> None:
        super().start(optimizer)
        for linear in self.linears.values():
            linear.remember_factors()

    @property
    def kinds(self) -> dict[str, str]:
        merged = dict.fromkeys(("merged_A", "merged_B"), "factors of the last merge")
        return {**super().kinds, **merged, **dict.fromkeys(("nf4_codes", "nf4_scales"), "frozen W, 4 bit")}

    def _adopt(self, name: str, linear: Any, mean: Tensor) -> None:
        linear.set_base(mean)
        linear.remember_factors()
        if not self.config.method.facts.resetless and name in self.origins:
            self.origins[name].store(mean)

    def stored_name(self, name: str) -> str:
        base, head = name.rsplit(".", 1)
        return of_head(self.first_head + int(head), base)

    def replicas(self) -> Iterator[Replica]:
        """Add the tensors of the base, which are equal over all heads."""
        yield from super().replicas()
        for name, linear in self.linears.items():
            for short, tensor in linear.base_tensors().items():
                yield Replica(f"{name}.{short}", tensor, "data")

    def slices(self) -> Iterator[TensorSlice]:
        """Yield the base, each head's factors at the last merge, and the origins.

        The base is NAME.weight, or its codes and scales. The factors are head_NN/NAME.merged_A and merged_B. The
        origins are NAME.origin.
        """
        for name, linear in self.linears.items():
            for short, base in linear.base_tensors().items():
                yield shard_slice(f"{name}.{short}", base, [linear.base_split(base)], "data")
            for head, (A, B) in enumerate(self._pairs(linear) if linear.resetless else []):
                for side, factor, merged in (("A", A, linear.merged_A), ("B", B, linear.merged_B)):
                    stored = self.stored_name(f"{name}.merged_{side}.{head}")
                    yield parameter_slice(stored, factor, replica_group(factor), merged[head])
        yield from self._origin_slices()
