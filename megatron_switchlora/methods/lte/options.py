"""Define LTE's options, their rules, and its facts (arXiv 2402.16828)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Optional, Union

from megatron_switchlora.config.errors import require
from megatron_switchlora.config.facts import option
from megatron_switchlora.config.method import register
from megatron_switchlora.config.run import RunConfig
from megatron_switchlora.methods.adapter_options import AdapterFacts, check_adapter, check_blocks
from megatron_switchlora.methods.switch_options import SwitchOptions, check_switching


@dataclass
class LteOptions:
    """Heads that train independently and are merged (LTE, arXiv 2402.16828), with method.name lte."""

    local_heads: int = option(1)
    """LTE heads in one process, which share one W; parallel.lte_heads times as many train in all. A resumed
    run may change the number of heads right after a merge."""
    merge_interval: Union[int, Literal["never"]] = option(10)
    """Steps T between merges of the heads."""
    merge_form: Literal["reset", "resetless"] = option("resetless")
    """resetless: factors stay and W is corrected; reset: B starts again at zero (LTE, Algorithm 1)."""
    merge_traffic: Literal["auto", "factors", "delta"] = option("auto")
    """What a merge exchanges. factors: all-gathered; delta: their mean product, all-reduced; auto: the smaller."""
    redraw_A: bool = option(False)
    """Re-initialise A at every merge (with merge_form reset)."""
    inner: Literal["lora", "switchlora"] = option("lora")
    """The method inside each head; switchlora reads method.switch."""
    base: Literal["fp32", "nf4"] = option("fp32")
    """How heads hold the frozen W: in fp32, or quantised to 4 bits, with the merges' origin in host memory."""


@register
class LteFacts(AdapterFacts):
    """Facts of LTE: heads with LoRA or SwitchLoRA inside."""

    name = "lte"
    about = "heads with adapters and optimizers of their own, merged every method.lte.merge_interval steps"
    sections = {"lte": LteOptions, "switch": SwitchOptions}  # noqa: RUF012
    inits = frozenset({"switchlora", "classic", "lora_ga", "semi_orthogonal"})
    merges = True

    @property
    def title(self) -> str:
        return f"lte with method.lte.inner {self.method.lte.inner}"

    @property
    def kind(self) -> Any:
        from megatron_switchlora.methods.lte.heads import LocalLte, Lte, LteSwitchLora

        if self.shares_base:
            return LocalLte
        return LteSwitchLora if self.switches else Lte

    @property
    def unused(self) -> list[str]:
        never = self.method.lte.merge_interval == "never"
        return [*super().unused, *(["lte.redraw_A"] if never else []), *([] if self.switches else ["switch"])]

    @property
    def may_change(self) -> list[str]:
        """`checkpoint/lte_regroup.py` decides when the number of heads may change."""
        return ["method.lte.local_heads", "method.lte.merge_traffic"]

    @property
    def default_init(self) -> str:
        return "semi_orthogonal" if self.method.lte.inner == "lora" else "switchlora"

    @property
    def default_alpha(self) -> float:
        """LTE's large s (appendix A) where B starts at zero, else s = 1 / rank."""
        return 4096.0 if self.method.initial in ("semi_orthogonal", "classic") else 1.0

    @property
    def default_lr(self) -> float:
        """A few per cent of full-rank training's rate at the large s (tables 5 and 6), else the inner method's rate."""
        if self.default_alpha > 1:
            return 0.00005
        return 0.02 if self.switches else super().default_lr

    def default_dense_lr(self, lr: float) -> float:
        """Return full-rank training's rate, as the heads' is far too small for dense tensors (tables 5 and 6)."""
        return 0.001

    @property
    def switches(self) -> bool:
        return self.method.lte.inner == "switchlora"

    @property
    def heads_here(self) -> int:
        return self.method.lte.local_heads

    @property
    def merge_interval(self) -> Optional[int]:
        interval = self.method.lte.merge_interval
        return None if isinstance(interval, str) else interval

    @property
    def shares_base(self) -> bool:
        return self.heads_here > 1 or self.quantised

    @property
    def quantised(self) -> bool:
        return self.method.lte.base == "nf4"

    @property
    def resetless(self) -> bool:
        return self.method.lte.merge_form == "resetless"

    @property
    def keeps_origins(self) -> bool:
        """Switches change W, so no common origin exists; a 4-bit base is too coarse to merge without one."""
        return (self.resetless and not self.switches) or self.quantised

    def check(self, config: RunConfig) -> None:
        check_adapter(config)
        _check_heads(config)
        if self.switches:
            check_switching(config)
            _check_switching_heads(config)
        _check_merges(config)


def _check_heads(config: RunConfig) -> None:
    lte, train, groups = config.method.lte, config.train, config.parallel.lte_heads
    require(lte.local_heads >= 1, f"method.lte.local_heads must be at least 1, not {lte.local_heads}.")
    interval = lte.merge_interval
    require(
        isinstance(interval, str) or interval >= 1,
        f"method.lte.merge_interval must be at least 1 step, or never, but it is {interval}.",
    )
    require(
        train.micro_batch_size % lte.local_heads == 0,
        f"train.micro_batch_size {train.micro_batch_size} must be a multiple of method.lte.local_heads "
        f"{lte.local_heads}, since each head takes an equal part of a micro-batch: change one of them.",
    )
    require(
        train.global_batch_size % config.heads == 0,
        f"train.global_batch_size {train.global_batch_size} must be a multiple of the {config.heads} LTE heads "
        f"(parallel.lte_heads {groups} x method.lte.local_heads {lte.local_heads}): change one of them.",
    )


def _check_merges(config: RunConfig) -> None:
    method = config.method
    lte, shares_base = method.lte, method.facts.shares_base
    resets = lte.merge_form == "reset"
    require(
        not resets or method.initial in ("semi_orthogonal", "classic"),
        f"method.lte.merge_form reset needs B = 0 and one W for all heads at the start, which method.init "
        f"{method.initial} does not give: use semi_orthogonal or classic, or method.lte.merge_form resetless.",
    )
    require(
        resets or not lte.redraw_A,
        "method.lte.redraw_A true needs method.lte.merge_form reset, since a new A changes the model's function where "
        "B is not zero: set merge_form to reset, or leave redraw_A out.",
    )
    require(
        not shares_base or method.compute != "merged",
        f"method.compute merged forms W + sBA, which heads cannot do over a base that is shared "
        f"(method.lte.local_heads {lte.local_heads}) or quantised (method.lte.base {lte.base}): use auto or split.",
    )
    if lte.base == "nf4":
        check_blocks(config, "method.lte.base nf4")


def _check_switching_heads(config: RunConfig) -> None:
    method = config.method
    lte = method.lte
    require(
        not method.facts.shares_base,
        f"method.lte.inner switchlora rewrites each head's own W, so heads cannot share one (method.lte.local_heads "
        f"{lte.local_heads}, method.lte.base {lte.base}): use parallel.lte_heads instead of method.lte.local_heads, "
        "and method.lte.base fp32.",
    )
    require(
        lte.merge_form == "resetless" and lte.merge_traffic != "factors",
        f"method.lte.inner switchlora changes the weights, so merges must be reset-less and must not send factors, but "
        f"method.lte.merge_form is {lte.merge_form} and method.lte.merge_traffic is {lte.merge_traffic}: leave both "
        "out.",
    )
