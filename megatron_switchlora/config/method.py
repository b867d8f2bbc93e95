"""The method section of the run configuration, and the table of methods.

Options that several methods share are fields of `MethodConfig`. Options of one method are a section of its own
(`method.relora.interval`): a dataclass that the method registers with its facts. This module knows no method. The
package `methods` fills the table at import, plugins add to it, and entry points import both before they parse.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, make_dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Optional

from megatron_switchlora.config.errors import require
from megatron_switchlora.config.facts import option


@dataclass
class LoraGaConfig:
    """Initial values from the gradient (LoRA-GA, arXiv 2407.05000), with method.init lora_ga."""

    vectors: Literal["gradient", "gaussian"] = option("gradient")
    """gradient: singular vectors of the gradient; gaussian: normal vectors of expected length 1. The paper's ablations:
    gradient and stable is LoRA-GA, gaussian and stable is stable output alone, gradient and unit is the gradient
    alone, gaussian and unit is Gaussian."""
    direction: Literal["ArB2r", "A2rBr", "ArBr", "random"] = option("ArB2r")
    """Which of the first 2r singular pairs. ArB2r: A takes the first r right vectors, B the left vectors r to 2r;
    A2rBr: the reverse; ArBr: alternately, B first; random: drawn from the seed, A's and B's disjoint."""
    scale: Literal["stable", "backward", "gd", "unit", "weight"] = option("stable")
    """Length c of every vector. stable: m^(1/4) / sqrt(gamma); backward: n^(1/4) / sqrt(gamma); gd: 1 / s; unit: 1;
    weight: mean of sqrt(sigma / s) over the first r singular values sigma of W."""
    gamma: float = option(16.0)
    """Divisor in the scales stable and backward: 16 for T5, 64 for LLaMA 7B in the paper."""
    samples: int = option(64)
    """Training samples over which the gradient is averaged, drawn by the seed."""
    svd: Literal["randomised", "exact"] = option("randomised")
    """randomised: on 2r + oversample vectors, also where the gradient is split over tensor-parallel ranks; exact: needs
    tp 1."""
    oversample: Optional[int] = option(None)
    """Vectors beyond 2r of the randomised decomposition; by default 2r more, as in the paper's code."""
    power_iterations: int = option(4)
    """Passes that sharpen the randomised decomposition."""


@dataclass
class MethodConfig:
    """How the linear layers of the decoder are trained. Each method's own options are in its section."""

    name: str = option("switchlora", basic=True)
    """The training method."""
    rank: int = option(24, basic=True)
    """Rank r of every adapter; with galore, of every projected gradient."""
    alpha: Optional[float] = option(None)
    """Numerator of the scaling s = alpha / rank. The default is alpha = 1, so s = 1 / rank (SwitchLoRA, eq. 4 and 14).
    With lte and mhlora, whose s is large (LTE, appendix A), the default is 4096, unless the initial B is not zero."""
    full_rank_steps: int = option(0)
    """Steps of full-rank training before the method begins, from the weights that they reach."""
    full_rank_lr: float = option(0.001)
    """Peak learning rate of the decoder's matrices in those steps. Dense tensors keep optim.dense_lr; where that is 0,
    they train at this rate too."""
    rslora: bool = option(False)
    """Scaling s = alpha / sqrt(rank) instead (rsLoRA, arXiv 2312.03732); LoRA-GA is defined with it."""
    init: Optional[Literal["switchlora", "classic", "pissa", "lora_ga", "semi_orthogonal"]] = option(None)
    """switchlora: A and B uniform with the paper's deviations and W <- W - sBA; classic: A kaiming uniform, B zero;
    pissa: W's principal singular vectors, and W <- W - sBA (not where vectors are switched); lora_ga: singular
    vectors of the gradient at the start (method.ga), and W <- W - sBA; semi_orthogonal: A's rows orthogonal, B zero.
    By default classic with relora, semi_orthogonal with mhlora and with lte over lora, else switchlora."""
    orthogonal_scale: Literal["sqrt_n_r", "sqrt_r_n"] = option("sqrt_n_r")
    """Scale of semi-orthogonal rows of length n: sqrt(n / r), as in LTE's code, or sqrt(r / n), as in its paper."""
    compute: Literal["auto", "merged", "split"] = option("auto", resume="free", results=False)
    """merged: form W + sBA, then one dense product; split: W x and s B (A x) separately; auto: whichever costs fewer
    FLOPs, per layer."""
    merged_cache: Literal["auto", "micro_batch", "accumulation", "recompute"] = option(
        "auto", resume="free", results=False
    )
    """How long the merged form keeps W + sBA: from a micro-batch's forward to its backward pass, over all micro-batches
    of a step, or not at all (formed again in the backward pass). auto: over all micro-batches, unless activations are
    checkpointed, where that would take memory."""
    base_precision: Literal["fp32", "nf4"] = option("fp32")
    """How lora holds the frozen W: in fp32, or in 4 bits once the initial product is subtracted (NormalFloat4, QLoRA,
    arXiv 2305.14314). Heads of lte have method.lte.base; methods that fold into W need fp32."""
    base_spread: Literal["none", "dp", "node"] = option("none", resume="free", results=False)
    """none: every data-parallel rank holds the whole frozen W in fp32; dp: each holds a part of its rows, and W + sBA
    is gathered in the precision of compute once per step; node: only those of one host share the rows, so that nothing
    is gathered between hosts. Layers then compute in the merged form."""
    ga: LoraGaConfig = field(default_factory=LoraGaConfig)
    """Initial values from the gradient, with init lora_ga."""

    if TYPE_CHECKING:  # the sections that methods register

        def __getattr__(self, name: str) -> Any: ...

    @property
    def facts(self) -> MethodFacts:
        """The facts of its method.

        Raises:
            UserError: there is no such method.
        """
        known = ", ".join(METHODS)
        require(self.name in METHODS, f"method.name must be one of {known}, not {self.name!r}: choose one of them.")
        return METHODS[self.name](self)

    @property
    def initial(self) -> str:
        """Initial values of the factors: `init`, or the method's default."""
        return self.init or self.facts.default_init

    @property
    def scaling(self) -> float:
        """s in W x + s B A x."""
        alpha = self.facts.default_alpha if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.rslora else self.rank) / self.facts.side_by_side

    @property
    def adapter_rank(self) -> int:
        """Number of vectors on each side of a layer's adapter."""
        return self.rank * self.facts.side_by_side


class MethodFacts:
    """What the rest of the package asks about a method, answered from its options.

    Every method registers a subclass. The answers here are those of an adapter that stays as it began, without heads.
    """

    name: ClassVar[str]
    about: ClassVar[str]
    """Its line in the help."""
    reads: ClassVar[frozenset[str]] = frozenset()
    """The shared options below `method` that it reads, beside its name."""
    sections: ClassVar[dict[str, type]] = {}
    """The sections that it reads. A section that no other method reads is refused with other methods."""
    inits: ClassVar[frozenset[str]] = frozenset()
    """The initial values that it accepts."""
    adapts: ClassVar[bool] = True
    """Whether W is frozen beside adapters; else the decoder's matrices train."""
    merges: ClassVar[bool] = False
    """Whether there are heads, on ranks of their own, that are merged."""

    def __init__(self, method: MethodConfig) -> None:
        self.method = method

    @property
    def title(self) -> str:
        """The name, with whatever else decides which options are read."""
        return self.name

    def check(self, config: Any) -> None:
        """Check the method's rules on the whole `RunConfig`.

        Raises:
            UserError: with the rule, the values and what to change.
        """

    def check_zero(self, stage: int) -> None:
        """Check that the method supports this ZeRO stage.

        Raises:
            UserError: it does not.
        """

    def require_packages(self) -> None:
        """Check that the optional packages that the method needs are there.

        Raises:
            UserError: one does not load.
        """

    @property
    def unused(self) -> list[str]:
        """Options that it reads, but that change nothing with the others as they are."""
        return []

    @property
    def may_change(self) -> list[str]:
        """Options that a resumed run may change, beside those whose own facts allow it."""
        return []

    @property
    def kind(self) -> Any:
        """The class that drives it, a subclass of `methods.base.Method`."""
        raise TypeError("a method must give the class that drives it")

    @property
    def default_init(self) -> str:
        return "switchlora"

    @property
    def default_alpha(self) -> float:
        return 1.0

    @property
    def default_lr(self) -> float:
        """The peak learning rate where none is given: that of full-rank training."""
        return 0.001

    def default_dense_lr(self, lr: float) -> float:
        """Return the peak learning rate of the dense tensors where none is given."""
        return lr

    @property
    def side_by_side(self) -> int:
        """Number of adapters of a layer that are computed as one wider adapter."""
        return 1

    @property
    def switches(self) -> bool:
        """Whether vectors are switched against a candidate bank."""
        return False

    @property
    def keeps_initial(self) -> bool:
        """Whether a run keeps A and B of its start: they make an adapter over the base it began from."""
        return False

    @property
    def heads_here(self) -> int:
        """LTE heads of one process."""
        return 1

    @property
    def merge_interval(self) -> Optional[int]:
        """Steps between merges; None: there are none."""
        return None

    @property
    def shares_base(self) -> bool:
        """Whether heads keep their last merge beside W, which other heads share, or which is quantised."""
        return False

    @property
    def quantised(self) -> bool:
        """Whether the frozen W is held in 4 bits."""
        return False

    @property
    def resetless(self) -> bool:
        """Whether merges reset nothing to zero."""
        return False

    @property
    def keeps_origins(self) -> bool:
        """Whether heads need their common origin at a merge."""
        return False


METHODS: dict[str, type[MethodFacts]] = {}  # filled at import, as config.family.FAMILIES


def register(facts: type[MethodFacts]) -> type[MethodFacts]:
    """Add a method to the table; a decorator for its facts."""
    METHODS[facts.name] = facts
    return facts


def all_sections() -> dict[str, type]:
    """Return the sections of all methods by name."""
    return {name: kind for facts in METHODS.values() for name, kind in facts.sections.items()}


def method_config_class() -> type[MethodConfig]:
    """Return `MethodConfig` with the sections of all methods that are registered by now."""
    return _with_sections(tuple(all_sections().items()))


@cache
def _with_sections(sections: tuple[tuple[str, type], ...]) -> type[MethodConfig]:
    made = [(name, kind, field(default_factory=kind)) for name, kind in sections]
    made_class = make_dataclass("MethodConfig", made, bases=(MethodConfig,))
    made_class.__doc__ = MethodConfig.__doc__
    return made_class


def make_method(name: str = "switchlora", **options: Any) -> MethodConfig:
    """Return a method's section; options of a method's own section are given as SECTION__OPTION."""
    own = {key: value for key, value in options.items() if "__" not in key}
    method = method_config_class()(name=name, **own)
    for key, value in options.items():
        section, _, option_name = key.partition("__")
        if option_name:
            held = getattr(method, section)
            known = {each.name for each in fields(held)}
            assert option_name in known, f"{section} has no option {option_name!r}"
            setattr(held, option_name, value)
    return method
