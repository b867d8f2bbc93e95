"""The run configuration: everything a run needs, in nested dataclasses, validated once by rules.py.

The YAML given with `--config` and the dotted command line options (`--optim.lr 0.02`) fill these
fields; the docstring under a field is its help text. DeepSpeed's JSON owns only DeepSpeed's own
concerns (stage, buckets, logging); where both could speak (batch sizes, clip, precision) the run
configuration decides and `train/ds_config.py` refuses a JSON that says otherwise.
The method's section stands in method_config.py; every other module of the package may import this one. What a
shape of the model must fulfil stands here (`check_model`) and not in rules.py, since an import checks it too.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, Optional, Union

from megatron_switchlora.method_config import LoraGaConfig as LoraGaConfig
from megatron_switchlora.method_config import MethodConfig as MethodConfig

# Scalings of the rotary embedding that do not depend on the sequence: keys that they need, keys that they may have.
ROPE_SCALINGS: dict[str, tuple[set[str], set[str]]] = {
    "linear": ({"factor"}, set()),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}, set()),
    "yarn": (
        {"factor", "original_max_position_embeddings"},
        {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
    ),
}


class UserError(ValueError):
    """A mistake in the input: the message gives the rule, the values and what to change."""


@dataclass
class ModelConfig:
    """Shape of the LLaMA."""

    vocab_size: Optional[int] = None
    """Vocabulary size; by default the tokenizer's."""
    hidden_size: int = 144
    """Width of the residual stream."""
    intermediate_size: int = 384
    """Width of the SwiGLU feed-forward."""
    num_layers: int = 4
    """Number of decoder layers."""
    num_heads: int = 4
    """Number of attention heads; hidden_size must be a multiple of it."""
    num_kv_heads: Optional[int] = None
    """Key/value heads of grouped-query attention; by default num_heads."""
    rope_theta: float = 10000.0
    """Base of the rotary position embedding."""
    rope_scaling: Optional[dict[str, Any]] = None
    """Scaling of the rotary embedding, written as transformers' rope_parameters without rope_theta: rope_type linear,
    llama3 or yarn, and its numbers, as in {"rope_type": "linear", "factor": 4.0}; by default none."""
    max_position_embeddings: Optional[int] = None
    """Context length that the exported model announces, unless train.seq_len is longer; by default train.seq_len."""
    rms_norm_eps: float = 1e-6
    """Epsilon of RMSNorm."""
    initializer_range: float = 0.02
    """Standard deviation of the normal initial values of all matrices."""
    tie_embeddings: bool = False
    """Use the input embedding as the output head."""

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


@dataclass
class OptimConfig:
    """AdamW with one step counter for each LoRA vector."""

    lr: float = 0.02
    """Peak learning rate of the adapters (with method full: of the decoder's matrices)."""
    dense_lr: Optional[float] = None
    """Peak learning rate of embedding, head and norms; by default lr, as SwitchLoRA published it, and 0.001 with lte
    and mhlora. Sweep it for every method."""
    lora_plus_ratio: float = 1.0
    """Learning rate of B as a multiple of A's, which is lr (LoRA+, arXiv 2402.12354; its authors advise 16)."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.999
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices (not of norms, not of frozen vectors)."""
    clip: float = 1.0
    """Clip of the global gradient norm; 0 switches it off."""


@dataclass
class TrainConfig:
    """Length, batch and numerics of a run."""

    steps: int = 600
    """Optimizer steps."""
    warmup_steps: int = 50
    """Steps of linear warm-up before the cosine to zero."""
    seq_len: int = 128
    """Tokens of a sample."""
    micro_batch_size: int = 8
    """Samples a rank handles at once."""
    global_batch_size: int = 32
    """Samples of a step over all ranks and accumulation."""
    epochs: Optional[int] = None
    """Passes over the data at most; by default as many as the steps need. A run whose data ends first stops there."""
    seed: int = 0
    """Seed of initial values, data order and switching draws."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of compute and of the communicated gradients; masters, moments and the frozen W are fp32."""
    eval_interval: int = 200
    """Steps between evaluations; one is made before the first step and one at the end."""
    eval_samples: Optional[int] = None
    """Validation samples used at most; by default all."""
    activation_checkpointing: bool = False
    """Recompute each decoder layer in the backward pass instead of keeping its activations."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU for every local rank; the CPU where none is seen."""
    threads: int = 0
    """CPU threads of a rank; 0 divides the cores by the local ranks."""
    check_interval: int = 100
    """Steps between checks that replicated tensors are still equal on all ranks that hold them; 0 switches them off."""
    init_from: Optional[str] = None
    """Start from the weights of a model imported by tools/convert_hf.py, of a checkpoint, or of a run's newest one."""
    stop_after_steps: Optional[int] = None
    """End this start of the run after so many of its steps, with a checkpoint; the same command line goes on."""
    stop_after_seconds: Optional[float] = None
    """End this start of the run after so many seconds of training, likewise."""


@dataclass
class CheckpointConfig:
    """When the run is saved, in the run folder's checkpoints/, and what a resumed run may change."""

    interval: int = 200
    """Steps between checkpoints; one is also written at the end and when the run is asked to stop. 0: only then."""
    keep_last: int = 2
    """Newest checkpoints kept."""
    keep_every: int = 0
    """Checkpoints at multiples of so many steps are kept for good, for tools/analyze.py to follow a run; 0: none."""
    background: bool = True
    """Write while training goes on, from a copy in host memory; false waits for the disk."""
    allow_changes: list[str] = field(default_factory=list)
    """Options that may differ from the checkpoint's: optim.*, train.steps, train.warmup_steps, train.epochs,
    train.precision, the numbers of the switching schedule, or data (another text, same tokenizer)."""


@dataclass
class DataConfig:
    """The text and its tokenizer."""

    source: Literal["stdlib", "files", "hf"] = "stdlib"
    """stdlib: the sources of Python's standard library on this machine; files: text, JSON lines (C4's .json.gz),
    Parquet; hf: a dataset of the Hugging Face hub, tokenised while it streams."""
    files: Union[list[str], str, None] = None
    """Training files or glob patterns (source files): one, or a list."""
    val_files: Union[list[str], str, None] = None
    """Validation files or patterns; without them the last val_fraction of the training text is held out."""
    val_fraction: float = 0.1
    """Share of the text (by characters, at its end) held out when there are no val_files."""
    text_field: str = "text"
    """Field of a JSON object, or column of a Parquet file, that holds the text."""
    hf_name: str = "allenai/c4"
    """Dataset of source hf: a name on the hub, or a folder laid out like one. Its files: JSON lines or Parquet."""
    hf_config: Optional[str] = "en"
    """Configuration of the dataset; null if it has only one. In a folder whose README.md names none: the subfolder."""
    hf_split: str = "train"
    """Split to train on."""
    hf_val_split: str = "validation"
    """Split to validate on."""
    hf_revision: Optional[str] = None
    """Commit, tag or branch on the hub; by default main. A full commit hash needs no network once data is cached."""
    max_documents: Optional[int] = 46_000_000
    """Training documents taken from the head of hf_split at most (default: the paper's share of C4); null: all."""
    max_val_documents: Optional[int] = 10_000
    """Validation documents taken from the head of hf_val_split at most; null: all."""
    max_bytes: int = 10_000_000
    """Size limit of the stdlib corpus."""
    tokenizer: str = "bpe"
    """bpe: byte-level BPE trained on the training text; char: its characters; else a Hugging Face folder or name."""
    vocab_size: int = 2048
    """Vocabulary of a trained bpe tokenizer."""
    add_bos: bool = False
    """Begin every document with the tokenizer's begin mark, for imported models that were pre-trained with one."""
    cache_dir: Optional[str] = None
    """Where tokenised data is kept; by default ~/.cache/megatron_switchlora (or under XDG_CACHE_HOME)."""

    def patterns(self, validation: bool = False) -> list[str]:
        """The file patterns as a list."""
        given = self.val_files if validation else self.files
        return [given] if isinstance(given, str) else list(given or [])


@dataclass
class ParallelConfig:
    """Mesh sizes; the data-parallel size is what remains of the world."""

    lte_heads: int = 1
    """Groups of ranks that train LTE heads of their own, the outermost axis; each has method.local_heads heads."""
    tp: int = 1
    """Tensor-parallel ranks, the innermost axis. Heads and key/value heads must divide; other sizes are padded."""
    start_timeout: float = 300.0
    """Seconds that ranks wait for one another at the start."""


@dataclass
class RunConfig:
    """One run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    output_dir: Optional[str] = None
    """Run folder; by default runs/<method>-<date>-<time>. One that holds another run is never written to."""
    resume: str = "auto"
    """auto: go on with the run in output_dir, if it holds one, from its newest checkpoint; none: never; else the path
    of a checkpoint, or of a run whose newest is taken."""

    @property
    def dense_lr(self) -> float:
        """Peak learning rate of the dense tensors. An LTE head's rate is far too small for them (LTE, tables 5, 6)."""
        default = 0.001 if self.method.of_lte else self.optim.lr
        return default if self.optim.dense_lr is None else self.optim.dense_lr

    @property
    def heads(self) -> int:
        """All LTE heads."""
        return self.parallel.lte_heads * self.method.heads_here

    def to_dict(self) -> dict:
        return asdict(self)


def full_rank_config(config: RunConfig) -> RunConfig:
    """What the full-rank phase before a method trains with (`method.full_rank_steps`)."""
    optim = replace(config.optim, lr=config.method.full_rank_lr, dense_lr=config.dense_lr, lora_plus_ratio=1.0)
    parallel = replace(config.parallel, lte_heads=1)
    return replace(config, method=MethodConfig(name="full"), optim=optim, parallel=parallel)


def method_config(config: RunConfig) -> RunConfig:
    """What the method trains with after it."""
    steps = config.train.steps - config.method.full_rank_steps
    return replace(config, train=replace(config.train, steps=steps))


def require(condition: bool, message: str) -> None:
    """Raise `UserError(message)` unless the condition holds."""
    if not condition:
        raise UserError(message)


def check_model(m: ModelConfig) -> None:
    """Check every rule of the model's shape alone.

    Raises:
        UserError: with the rule, the values and what to change.
    """
    for name in ("hidden_size", "intermediate_size", "num_layers", "num_heads"):
        value = getattr(m, name)
        require(value >= 1, f"model.{name} must be at least 1, not {value}: give a positive size.")
    require(
        m.num_kv_heads is None or m.num_kv_heads >= 1,
        f"model.num_kv_heads must be at least 1, not {m.num_kv_heads}: leave it out for as many as model.num_heads.",
    )
    require(
        m.hidden_size % m.num_heads == 0,
        f"model.hidden_size {m.hidden_size} must be a multiple of model.num_heads {m.num_heads}: change one of them.",
    )
    require(
        m.head_dim % 2 == 0,
        f"The head size {m.head_dim} (model.hidden_size {m.hidden_size} / model.num_heads {m.num_heads}) must be even "
        "for rotary embeddings: change one of them.",
    )
    require(
        m.num_heads % m.kv_heads == 0,
        f"model.num_heads {m.num_heads} must be a multiple of model.num_kv_heads {m.kv_heads}: change one of them.",
    )
    for name in ("initializer_range", "rope_theta", "rms_norm_eps"):
        number = getattr(m, name)
        require(math.isfinite(number) and number > 0, f"model.{name} must be positive, not {number}.")
    if m.rope_scaling is not None:
        _check_rope_scaling(m.rope_scaling, m.rope_theta)
    length = m.max_position_embeddings
    require(length is None or length >= 1, f"model.max_position_embeddings must be at least 1, not {length}.")
    require(m.vocab_size is None or m.vocab_size >= 1, f"model.vocab_size must be positive, not {m.vocab_size}.")


def _check_rope_scaling(scaling: dict[str, Any], theta: float) -> None:
    kind: Any = scaling.get("rope_type")
    supported = ", ".join(ROPE_SCALINGS)
    require(
        kind not in ("dynamic", "longrope"),
        f"model.rope_scaling has rope_type {kind!r}, whose frequencies change with the length of the sequence; "
        f"supported are {supported}, which do not. Where sequences stay within the model's max_position_embeddings, "
        "dynamic scales nothing: leave it out. For longrope, start from a model with another scaling.",
    )
    require(
        isinstance(kind, str) and kind in ROPE_SCALINGS,
        f"model.rope_scaling must name a rope_type of {supported}, not {kind!r}: give one of them, or null for none.",
    )
    needed, optional = ROPE_SCALINGS[kind]
    given = set(scaling) - {"rope_type"}
    require(
        needed <= given <= needed | optional,
        f"model.rope_scaling of rope_type {kind} must have {', '.join(sorted(needed))}"
        + (f" and may have {', '.join(sorted(optional))}" if optional else "")
        + f"; it has {', '.join(sorted(map(str, given))) or 'nothing else'}: add what is missing, leave out the rest.",
    )
    for name in sorted(given):
        _check_rope_value(name, scaling[name])
    _check_rope_order(kind, scaling, theta)


def _check_rope_order(kind: str, scaling: dict[str, Any], theta: float) -> None:
    factor = scaling["factor"]
    require(factor >= 1, f"model.rope_scaling.factor stretches the context and must be at least 1, it is {factor}.")
    if kind == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        require(
            low < high,
            f"model.rope_scaling.low_freq_factor {low} must be below high_freq_factor {high}: change one of them.",
        )
    if kind == "yarn":
        slow, fast = scaling.get("beta_slow", 1), scaling.get("beta_fast", 32)
        require(
            slow <= fast,
            f"model.rope_scaling.beta_slow {slow} must not be above beta_fast {fast} (by default 1 and 32): change one "
            "of them.",
        )
        require(theta > 1, f"model.rope_theta must be above 1 for rope_type yarn, it is {theta}: raise it.")


def _check_rope_value(name: str, value: Any) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if name == "truncate":
        require(isinstance(value, bool), f"model.rope_scaling.truncate must be true or false, not {value!r}.")
    elif name == "original_max_position_embeddings":
        require(
            whole and 1 <= value < 1e9,
            f"model.rope_scaling.{name} must be a whole number from 1 and below 1e9, not {value!r}.",
        )
    else:
        require(
            (whole or isinstance(value, float)) and 0 < value < 1e9,
            f"model.rope_scaling.{name} must be a number above 0 and below 1e9, not {value!r}.",
        )


def shard_size(size: int, ranks: int) -> int:
    """What each of `ranks` holds of a dimension, padding included."""
    return -(-size // ranks)


def require_shard(name: str, size: int, tp: int) -> None:
    """Every tensor-parallel rank must hold something real of a padded dimension.

    Raises:
        UserError: the last rank's shard would be padding alone.
    """
    shard = shard_size(size, tp)
    require(
        shard * (tp - 1) < size,
        f"{name} {size} over parallel.tp {tp} gives shards of {shard}, which leaves the last rank padding alone: lower "
        "parallel.tp.",
    )


def accumulation_steps(config: RunConfig, dp: int) -> int:
    """Micro-batches a rank runs per step; `dp` are the data-parallel ranks of a head.

    Raises:
        UserError: global batch not divisible by micro batch times heads times data-parallel size.
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
