"""The run configuration: everything a run needs, in nested dataclasses, validated once.

The YAML given with `--config` and the dotted command line options (`--optim.lr 0.02`) fill these
fields; the docstring under a field is its help text. DeepSpeed's JSON owns only DeepSpeed's own
concerns (stage, buckets, logging); where both could speak (batch sizes, clip, precision) the run
configuration decides and `train/ds_config.py` refuses a JSON that says otherwise.
This module imports nothing of the package: every other module may import it.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Literal, Optional, Union


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
class MethodConfig:
    """How the linear layers of the decoder are trained."""

    name: Literal["full", "lora", "switchlora"] = "switchlora"
    """full: every weight; lora: a fixed low-rank adapter; switchlora: adapters whose vectors are switched."""
    rank: int = 24
    """Rank r of every adapter."""
    alpha: float = 1.0
    """Scaling s = alpha / rank (SwitchLoRA, eq. 4 and 14)."""
    init: Literal["switchlora", "classic"] = "switchlora"
    """switchlora: A and B uniform with the paper's deviations and W <- W - sBA; classic: A kaiming uniform, B zero."""
    interval0: float = 40.0
    """Switching interval at the start: r / interval0 vectors a side, layer and step."""
    switch_ratio: float = 0.1
    """The switching rate falls to 0.3 of its start after this share of switch_total_steps."""
    switch_total_steps: Optional[int] = None
    """Length T of the switching schedule in steps; by default train.steps."""
    freeze_steps: int = 5
    """Steps N for which the counterpart of a switched vector is frozen (0 masks the stale gradient once, as 1)."""
    selection: Literal["ring", "random", "independent"] = "ring"
    """ring: positions and candidates in order; random: candidates drawn at random; independent: positions too,
    with separate counts for A and B (Algorithm 2 of the paper)."""
    bank_device: Literal["device", "host"] = "device"
    """Where the candidate vectors live; host memory is pinned when there is a GPU."""
    bank_spread: Literal["tp", "dp"] = "tp"
    """tp: no candidate is held twice over the tensor-parallel ranks, data-parallel ranks hold copies; dp: candidates
    are spread over the data-parallel ranks too."""
    compute: Literal["auto", "merged", "split"] = "auto"
    """merged: form W + sBA, then one dense product; split: W x and s B (A x) apart; auto: whichever costs fewer
    FLOPs, a layer at a time."""
    merged_cache: Literal["micro_batch", "accumulation", "recompute"] = "micro_batch"
    """How long the merged form keeps W + sBA: from a micro-batch's forward to its backward, over all micro-batches of
    a step, or not at all (formed again in backward)."""


@dataclass
class OptimConfig:
    """AdamW with one step counter for each LoRA vector."""

    lr: float = 0.02
    """Peak learning rate of the adapters (with method full: of the decoder's matrices)."""
    dense_lr: Optional[float] = None
    """Peak learning rate of embedding, head and norms; by default lr, as published. Sweep it for every method."""
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
    """auto: a GPU for every local rank if there are enough, else the CPU."""
    threads: int = 0
    """CPU threads of a rank; 0 divides the cores by the local ranks."""
    check_interval: int = 100
    """Steps between checks that replicated tensors are still equal on all ranks that hold them; 0 switches them off."""


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
    """LTE heads, the outermost axis (only 1 for now)."""
    tp: int = 1
    """Tensor-parallel ranks, the innermost axis. Heads and key/value heads must divide; other sizes are padded."""


@dataclass
class RunConfig:
    """One run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    output_dir: Optional[str] = None
    """Run folder; by default runs/<method>-<date>-<time>. A folder that holds a run is never written to."""

    def to_dict(self) -> dict:
        return asdict(self)


def require(condition: bool, message: str) -> None:
    """Raise `UserError(message)` unless the condition holds."""
    if not condition:
        raise UserError(message)


def _validate_model(m: ModelConfig) -> None:
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
    require(m.vocab_size is None or m.vocab_size >= 1, f"model.vocab_size must be positive, not {m.vocab_size}.")


def _validate_method(config: RunConfig) -> None:
    method, m = config.method, config.model
    if method.name == "full":
        return
    kv_size = m.kv_heads * m.head_dim
    smallest = min(m.hidden_size, m.intermediate_size, kv_size)
    require(
        1 <= method.rank <= smallest,
        f"method.rank must be between 1 and min(m, n) of every adapted matrix, here {smallest}; it is {method.rank}: "
        "lower the rank or widen the model.",
    )
    require(method.alpha > 0, f"method.alpha must be positive, not {method.alpha}.")
    if method.name != "switchlora":
        return
    require(
        method.rank >= 2, "method.rank 1 cannot switch: A and B switch different positions, so give rank 2 or more."
    )
    largest = m.hidden_size  # of q and o; kv and a narrow feed-forward have less
    require(
        method.rank < largest,
        f"A bank has min(m, n) candidates for each matrix, of which method.rank are live, so method.rank {method.rank} "
        f"leaves nothing to switch in any matrix (min(m, n) is {largest} at most): lower the rank, or use method.name "
        "lora.",
    )
    require(method.freeze_steps >= 0, f"method.freeze_steps must not be negative, it is {method.freeze_steps}.")
    require(method.interval0 > 0, f"method.interval0 must be positive, not {method.interval0}.")
    require(
        method.interval0 >= 2 * method.freeze_steps,
        f"method.interval0 must be at least 2 * method.freeze_steps, or frozen vectors would fill the ring; they are "
        f"{method.interval0:g} and {method.freeze_steps}: raise the interval or freeze for fewer steps.",
    )
    require(method.switch_ratio > 0, f"method.switch_ratio must be positive, not {method.switch_ratio}.")
    total = method.switch_total_steps
    require(total is None or total >= 1, f"method.switch_total_steps must be at least 1, not {total}.")


def _validate_train(config: RunConfig) -> None:
    t, o = config.train, config.optim
    for name in ("steps", "seq_len", "micro_batch_size", "global_batch_size", "eval_interval"):
        value = getattr(t, name)
        require(value >= 1, f"train.{name} must be at least 1, not {value}.")
    require(
        0 <= t.warmup_steps <= t.steps,
        f"train.warmup_steps must lie between 0 and train.steps {t.steps}; it is {t.warmup_steps}.",
    )
    require(t.epochs is None or t.epochs >= 1, f"train.epochs must be at least 1, not {t.epochs}.")
    require(
        t.eval_samples is None or t.eval_samples >= 1, f"train.eval_samples must be at least 1, not {t.eval_samples}."
    )
    require(t.threads >= 0, f"train.threads must not be negative, it is {t.threads}.")
    require(t.check_interval >= 0, f"train.check_interval must not be negative, it is {t.check_interval}.")
    require(t.seed >= 0, f"train.seed must not be negative, it is {t.seed}.")
    for name in ("lr", "eps"):
        value = getattr(o, name)
        require(math.isfinite(value) and value > 0, f"optim.{name} must be positive, not {value}.")
    require(
        o.dense_lr is None or (math.isfinite(o.dense_lr) and o.dense_lr >= 0),
        f"optim.dense_lr must not be negative, it is {o.dense_lr}.",
    )
    for name in ("beta1", "beta2"):
        value = getattr(o, name)
        require(0 <= value < 1, f"optim.{name} must lie in [0, 1), it is {value}.")
    require(o.clip >= 0, f"optim.clip must not be negative (0 switches it off), it is {o.clip}.")
    require(o.weight_decay >= 0, f"optim.weight_decay must not be negative, it is {o.weight_decay}.")


def _validate_data(d: DataConfig) -> None:
    if d.source == "files":
        require(bool(d.files), "data.source files needs data.files: give file names or glob patterns.")
    else:
        require(
            not d.files and not d.val_files,
            f"data.files and data.val_files belong to data.source files, not {d.source}.",
        )
    if d.source == "hf":
        require(
            d.tokenizer not in ("bpe", "char"),
            f"data.source hf keeps no text to build a {d.tokenizer} tokenizer from: give a Hugging Face name or folder "
            "as data.tokenizer, such as t5-base or the tokenizer/ of an earlier run.",
        )
        require(
            d.hf_split != d.hf_val_split,
            f"data.hf_split and data.hf_val_split are both {d.hf_split!r}: validate on another split.",
        )
    of_hf = [f for f in fields(d) if f.name.startswith("hf_") or f.name in ("max_documents", "max_val_documents")]
    given = [f.name for f in of_hf if getattr(d, f.name) != f.default]
    require(d.source == "hf" or not given, f"data.{', data.'.join(given)} belong to data.source hf, not {d.source}.")
    for name in ("max_documents", "max_val_documents"):
        value = getattr(d, name)
        require(value is None or value >= 1, f"data.{name} must be at least 1 or null for all, not {value}.")
    require(0 < d.val_fraction < 1, f"data.val_fraction must lie between 0 and 1, it is {d.val_fraction}.")
    require(
        d.vocab_size >= 257, f"data.vocab_size must be at least 257 (256 bytes and an end mark), it is {d.vocab_size}."
    )
    require(d.max_bytes >= 1, f"data.max_bytes must be positive, not {d.max_bytes}.")


def _validate_parallel(config: RunConfig) -> None:
    m, tp, heads = config.model, config.parallel.tp, config.parallel.lte_heads
    require(heads == 1, f"parallel.lte_heads {heads} is not supported yet: the mesh is 1 x dp x tp, so set it to 1.")
    require(tp >= 1, f"parallel.tp must be at least 1, not {tp}.")
    for name, count in (("num_heads", m.num_heads), ("num_kv_heads", m.kv_heads)):
        require(
            count % tp == 0,
            f"model.{name} {count} must be a multiple of parallel.tp {tp}, since a rank holds whole heads: change one "
            "of them.",
        )
    require_shard("model.intermediate_size", m.intermediate_size, tp)
    if m.vocab_size is not None:
        require_shard("The vocabulary", m.vocab_size, tp)


def require_shard(name: str, size: int, tp: int) -> None:
    """Every tensor-parallel rank must hold something real of a padded dimension.

    Raises:
        UserError: the last rank's shard would be padding alone.
    """
    shard = -(-size // tp)
    require(
        shard * (tp - 1) < size,
        f"{name} {size} over parallel.tp {tp} gives shards of {shard}, which leaves the last rank padding alone: lower "
        "parallel.tp.",
    )


def validate(config: RunConfig) -> None:
    """Check every rule that needs no data and no process group.

    Raises:
        UserError: with the rule, the values and what to change.
    """
    _validate_model(config.model)
    _validate_method(config)
    _validate_train(config)
    _validate_data(config.data)
    _validate_parallel(config)


def accumulation_steps(train: TrainConfig, dp: int) -> int:
    """Micro-batches a rank runs per step.

    Raises:
        UserError: global batch not divisible by micro batch times data-parallel size.
    """
    per_pass = train.micro_batch_size * dp
    require(
        train.global_batch_size % per_pass == 0,
        f"train.global_batch_size {train.global_batch_size} must be a multiple of train.micro_batch_size "
        f"{train.micro_batch_size} x {dp} data-parallel ranks = {per_pass}: change one of them.",
    )
    return train.global_batch_size // per_pass
