"""The run configuration: everything that a run needs, in nested dataclasses.

The YAML of `--config` and dotted command line options (`--optim.lr 0.02`) fill the fields; the docstring under a field
is its help. DeepSpeed's JSON owns only DeepSpeed's own settings (stage, buckets, overlap). For what both could set
(batch sizes, clip, precision) the run configuration decides, and `config/ds_config.py` refuses a JSON that differs.

Each section is in a module of its own, with its rules; `rules.py` has the rules between sections.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, make_dataclass, replace
from functools import cache
from typing import Optional, Union

from megatron_switchlora.config.checkpoint import CheckpointConfig
from megatron_switchlora.config.data import DataConfig
from megatron_switchlora.config.errors import require
from megatron_switchlora.config.facts import option
from megatron_switchlora.config.log import LogConfig
from megatron_switchlora.config.method import MethodConfig, make_method, method_config_class
from megatron_switchlora.config.model import ModelConfig
from megatron_switchlora.config.optim import OptimConfig
from megatron_switchlora.config.parallel import ParallelConfig
from megatron_switchlora.config.train import TrainConfig


@dataclass
class RunConfig:
    """One run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    method: MethodConfig = field(default_factory=make_method)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    output_dir: Optional[str] = option(None, resume="free", results=False, swept=True, path=True, basic=True)
    """Run folder; by default runs/<method>-<date>-<time>. A folder that holds another run is never written to."""
    plugins: Union[list[str], str, None] = option(None)
    """Python modules that register methods or model families of their own, imported before the rest is read: one, or a
    list."""
    resume: str = option("auto", resume="free", results=False, swept=True, path=True)
    """auto: resume the run in output_dir, if it holds one, from its newest checkpoint; none: never resume; else the
    path of a checkpoint, or of a run whose newest checkpoint is used."""

    @property
    def lr(self) -> float:
        """Peak learning rate of the decoder's matrices or their adapters: `optim.lr`, or the method's default."""
        return self.method.facts.default_lr if self.optim.lr is None else self.optim.lr

    @property
    def dense_lr(self) -> float:
        """Peak learning rate of the dense tensors: `optim.dense_lr`, or the method's default."""
        given = self.optim.dense_lr
        return self.method.facts.default_dense_lr(self.lr) if given is None else given

    @property
    def freezes_dense(self) -> bool:
        """Whether embedding, lm_head and norms stay as they begin: no gradient, no moments, nothing to communicate."""
        return self.dense_lr == 0

    @property
    def heads(self) -> int:
        """Number of all LTE heads."""
        return self.parallel.lte_heads * self.method.facts.heads_here

    def to_dict(self) -> dict:
        return asdict(self)


@dataclass
class AttachedConfig(RunConfig):
    """A method on somebody's model: the (out, in) of the matrices that get adapters stand for its `model` section."""

    shapes: list[tuple[int, int]] = field(default_factory=list)


def run_config_class() -> type[RunConfig]:
    """Return `RunConfig` with the sections of all methods that are registered by now, for the command line."""
    return _with_method(method_config_class())  # type: ignore[arg-type]


@cache
def _with_method(method: type[MethodConfig]) -> type[RunConfig]:
    made_class = make_dataclass("RunConfig", [("method", method, field(default_factory=method))], bases=(RunConfig,))
    made_class.__doc__ = RunConfig.__doc__
    return made_class


def full_rank_config(config: RunConfig) -> RunConfig:
    """Return the configuration of the full-rank phase before a method (`method.full_rank_steps`).

    It trains every weight: dense tensors that the method freezes train at `method.full_rank_lr`.
    """
    rate = config.method.full_rank_lr
    optim = replace(config.optim, lr=rate, dense_lr=config.dense_lr or rate, lora_plus_ratio=1.0)
    parallel = replace(config.parallel, lte_heads=1)
    return replace(config, method=make_method("full"), optim=optim, parallel=parallel)


def method_config(config: RunConfig) -> RunConfig:
    """Return the configuration of the method's own phase, after the full-rank phase."""
    steps = config.train.steps - config.method.full_rank_steps
    return replace(config, train=replace(config.train, steps=steps))


def compute_bytes(config: RunConfig) -> int:
    """Return the bytes of a number in the precision of compute."""
    return 2 if config.train.precision == "bf16" else 4


def accumulation_steps(config: RunConfig, dp: int) -> int:
    """Return the micro-batches that a rank runs per step; `dp` is the number of data-parallel ranks of a head.

    Raises:
        UserError: the global batch is no multiple of micro batch times heads times data-parallel size.
    """
    train, heads = config.train, config.parallel.lte_heads
    per_pass = train.micro_batch_size * dp * heads
    over = f"{heads} LTE heads x " if heads > 1 else ""
    require(
        train.global_batch_size % per_pass == 0,
        f"train.global_batch_size {train.global_batch_size} must be a multiple of train.micro_batch_size "
        f"{train.micro_batch_size} x {over}{dp} data-parallel ranks = {per_pass}: change one of them.",
    )
    return train.global_batch_size // per_pass
