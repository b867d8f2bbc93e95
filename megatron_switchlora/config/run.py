"""The run configuration: everything a run needs, in nested dataclasses, validated once by rules.py.

The YAML given with `--config` and the dotted command line options (`--optim.lr 0.02`) fill these
fields; the docstring under a field is its help text. DeepSpeed's JSON owns only DeepSpeed's own
concerns (stage, buckets, logging); where both could speak (batch sizes, clip, precision) the run
configuration decides and `config/ds_config.py` refuses a JSON that says otherwise.
The method's section stands in method_config.py; every other module of the package may import this one. What a
shape of the model must fulfil stands in rules_model.py, since an import checks it too.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, make_dataclass, replace
from functools import cache
from typing import Any, Literal, Optional, Union

from megatron_switchlora.config.errors import require
from megatron_switchlora.config.facts import option
from megatron_switchlora.config.method import MethodConfig, make_method, method_config_class


@dataclass
class ModelConfig:
    """Family and shape of the model."""

    family: str = option("llama")
    """The model family; plugins may add some."""
    vocab_size: Optional[int] = option(None, resume="free")
    """Vocabulary size; by default the tokenizer's."""
    hidden_size: int = option(144)
    """Width of the residual stream."""
    intermediate_size: int = option(384)
    """Width of the SwiGLU feed-forward."""
    num_layers: int = option(4)
    """Number of decoder layers."""
    num_heads: int = option(4)
    """Number of attention heads; hidden_size must be a multiple of it."""
    num_kv_heads: Optional[int] = option(None)
    """Key/value heads of grouped-query attention; by default num_heads."""
    rope_theta: float = option(10000.0)
    """Base of the rotary position embedding."""
    rope_scaling: Optional[dict[str, Any]] = option(None)
    """Scaling of the rotary embedding, written as transformers' rope_parameters without rope_theta: rope_type linear,
    llama3 or yarn, and its numbers, as in {"rope_type": "linear", "factor": 4.0}; by default none."""
    max_position_embeddings: Optional[int] = option(None, resume="free")
    """Context length that the exported model announces, unless train.seq_len is longer; by default train.seq_len."""
    rms_norm_eps: float = option(1e-6)
    """Epsilon of RMSNorm."""
    initializer_range: float = option(0.02)
    """Standard deviation of the normal initial values of all matrices."""
    tie_embeddings: bool = option(False)
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

    lr: Optional[float] = option(None, resume="ask", swept=True, basic=True)
    """Peak learning rate of the adapters (with full and galore: of the decoder's matrices); by default the method's,
    from its paper or from the one that compares it."""
    dense_lr: Optional[float] = option(None, resume="ask", swept=True, basic=True)
    """Peak learning rate of embedding, head and norms; by default lr, as SwitchLoRA published it, and 0.001 with lte
    and mhlora; 0 freezes them. Sweep it for every method."""
    lora_plus_ratio: float = option(1.0, resume="ask")
    """Learning rate of B as a multiple of A's, which is lr (LoRA+, arXiv 2402.12354; its authors advise 16)."""
    beta1: float = option(0.9, resume="ask")
    """Decay of the first moment."""
    beta2: float = option(0.999, resume="ask")
    """Decay of the second moment."""
    eps: float = option(1e-8, resume="ask")
    """Added to the root of the second moment."""
    weight_decay: float = option(0.0, resume="ask")
    """Decoupled weight decay of matrices (not of norms, not of frozen vectors)."""
    clip: float = option(1.0, resume="ask")
    """Clip of the global gradient norm; 0 switches it off."""


@dataclass
class TrainConfig:
    """Length, batch and numerics of a run."""

    steps: int = option(600, resume="ask", basic=True)
    """Optimizer steps."""
    warmup_steps: int = option(50, resume="ask")
    """Steps of linear warm-up before the cosine to zero."""
    seq_len: int = option(128)
    """Tokens of a sample."""
    micro_batch_size: int = option(8, resume="free", results=False)
    """Samples a rank handles at once."""
    global_batch_size: int = option(32, basic=True)
    """Samples of a step over all ranks and accumulation."""
    epochs: Optional[int] = option(None, resume="ask")
    """Passes over the data at most; by default as many as the steps need. A run whose data ends first stops there."""
    seed: int = option(0, swept=True)
    """Seed of initial values, data order and switching draws."""
    precision: Literal["fp32", "bf16"] = option("fp32", resume="ask")
    """Precision of compute and of the communicated gradients; masters, moments and the frozen W are fp32."""
    eval_interval: int = option(200, resume="free", results=False)
    """Steps between evaluations; one is made before the first step and one at the end."""
    eval_samples: Optional[int] = option(None, resume="free")
    """Validation samples used at most; by default all."""
    activation_checkpointing: bool = option(False, resume="free", results=False)
    """Recompute each decoder layer in the backward pass instead of keeping its activations."""
    device: Literal["auto", "cpu", "cuda"] = option("auto", resume="free", results=False)
    """auto: a GPU for every local rank; the CPU where none is seen."""
    threads: int = option(0, resume="free", results=False)
    """CPU threads of a rank; 0: as OMP_NUM_THREADS or MKL_NUM_THREADS says (torchrun sets OMP_NUM_THREADS to 1 for
    several ranks of a host where it is not set), else the host's usable cores divided by its ranks."""
    check_interval: int = option(100, resume="free", results=False)
    """Steps between checks that replicated tensors are still equal on all ranks that hold them; 0 switches them off."""
    init_from: Optional[str] = option(None, resume="free", path=True)
    """Start from the weights of a model imported by tools/convert_hf.py, of a checkpoint, or of a run's newest one."""
    stop_after_steps: Optional[int] = option(None, resume="free", results=False, swept=True)
    """End this start of the run after so many of its steps, with a checkpoint; the same command line goes on."""
    stop_after_seconds: Optional[float] = option(None, resume="free", results=False, swept=True)
    """End this start of the run after so many seconds of training, likewise."""


@dataclass
class CheckpointConfig:
    """When the run is saved, in the run folder's checkpoints/, and what a resumed run may change."""

    interval: int = option(200, resume="free", results=False)
    """Steps between checkpoints; one is also written at the end and when the run is asked to stop. 0: only then."""
    keep_last: int = option(2, resume="free", results=False)
    """Newest checkpoints kept."""
    keep_every: int = option(0, resume="free", results=False)
    """Checkpoints at multiples of so many steps are kept for good, for tools/analyze.py to follow a run; 0: none."""
    background: bool = option(True, resume="free", results=False)
    """Write while training goes on, from a copy in host memory; false waits for the disk."""
    allow_changes: list[str] = option(factory=list, resume="free", results=False)
    """Options that may differ from the checkpoint's: optim.*, train.steps, train.warmup_steps, train.epochs,
    train.precision, the numbers of the switching schedule, or data (another text, same tokenizer)."""


@dataclass
class DataConfig:
    """The text and its tokenizer."""

    source: Literal["stdlib", "files", "hf"] = option("stdlib", resume="free", basic=True)
    """stdlib: the sources of Python's standard library on this machine; files: text, JSON lines (C4's .json.gz),
    Parquet; hf: a dataset of the Hugging Face hub, tokenised while it streams."""
    files: Union[list[str], str, None] = option(None, resume="free", results=False, path=True, basic=True)
    """Training files or glob patterns (source files): one, or a list."""
    val_files: Union[list[str], str, None] = option(None, resume="free", results=False, path=True)
    """Validation files or patterns; without them the last val_fraction of the training text is held out."""
    val_fraction: float = option(0.1, resume="free")
    """Share of the text (by characters, at its end) held out when there are no val_files."""
    text_field: str = option("text", resume="free")
    """Field of a JSON object, or column of a Parquet file, that holds the text; a.b: field b of a."""
    on_bad_document: Literal["error", "skip"] = option("error", resume="free")
    """What a document that cannot be read does (no such field, broken JSON, not UTF-8, no text): error ends the build,
    skip leaves it out and counts it. Files that are cut off or damaged always end it."""
    hf_name: str = option("allenai/c4", resume="free", path=True)
    """Dataset of source hf: a name on the hub, or a folder laid out like one. Its files: JSON lines or Parquet."""
    hf_config: Optional[str] = option("en", resume="free")
    """Configuration of the dataset; null if it has only one. In a folder whose README.md names none: the subfolder."""
    hf_split: str = option("train", resume="free")
    """Split to train on."""
    hf_val_split: str = option("validation", resume="free")
    """Split to validate on."""
    hf_revision: Optional[str] = option(None, resume="free")
    """Commit, tag or branch on the hub; by default main. A full commit hash needs no network once data is cached."""
    max_documents: Optional[int] = option(46_000_000, resume="free")
    """Training documents taken from the head of hf_split at most (default: the paper's share of C4); null: all."""
    max_val_documents: Optional[int] = option(10_000, resume="free")
    """Validation documents taken from the head of hf_val_split at most; null: all."""
    max_bytes: int = option(10_000_000, resume="free")
    """Size limit of the stdlib corpus."""
    tokenizer: str = option("bpe", resume="free", path=True)
    """bpe: byte-level BPE trained on the training text; char: its characters; else a Hugging Face folder or name."""
    vocab_size: int = option(2048, resume="free")
    """Vocabulary of a trained bpe tokenizer."""
    add_bos: bool = option(False, resume="free")
    """Begin every document with the tokenizer's begin mark, for imported models that were pre-trained with one."""
    cache_dir: Optional[str] = option(None, resume="free", results=False, path=True)
    """Where tokenised data is kept; by default ~/.cache/megatron_switchlora (or under XDG_CACHE_HOME)."""

    def patterns(self, validation: bool = False) -> list[str]:
        """The file patterns as a list."""
        given = self.val_files if validation else self.files
        return [given] if isinstance(given, str) else list(given or [])


@dataclass
class ParallelConfig:
    """Mesh sizes; the data-parallel size is what remains of the world."""

    lte_heads: int = option(1, resume="free")
    """Groups of ranks that train LTE heads of their own, the outermost axis; each has method.lte.local_heads heads."""
    tp: int = option(1, resume="free", results=False, basic=True)
    """Tensor-parallel ranks, the innermost axis. Heads and key/value heads must divide; other sizes are padded."""
    start_timeout: float = option(300.0, resume="free", results=False)
    """Seconds that ranks wait for one another at the start."""
    timeout: float = option(300.0, resume="free", results=False)
    """Seconds, at least 1, after which a rank that is stopped, gone or not coming to a collective is named with its
    host, and all ranks end. What one rank does alone (data, checkpoints, export) may take longer while it lives."""


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
    output_dir: Optional[str] = option(None, resume="free", results=False, swept=True, path=True, basic=True)
    """Run folder; by default runs/<method>-<date>-<time>. One that holds another run is never written to."""
    plugins: Union[list[str], str, None] = option(None)
    """Python modules that register methods or model families of their own, imported before the rest is read: one, or a
    list."""
    resume: str = option("auto", resume="free", results=False, swept=True, path=True)
    """auto: go on with the run in output_dir, if it holds one, from its newest checkpoint; none: never; else the path
    of a checkpoint, or of a run whose newest is taken."""

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
        """Whether embedding, head and norms stay as they begin: no gradient, no moments, nothing to communicate."""
        return self.dense_lr == 0

    @property
    def heads(self) -> int:
        """All LTE heads."""
        return self.parallel.lte_heads * self.method.facts.heads_here

    def to_dict(self) -> dict:
        return asdict(self)


def run_config_class() -> type[RunConfig]:
    """Return `RunConfig` with the sections of all methods that are registered by now, for the command line."""
    return _with_method(method_config_class())  # type: ignore[arg-type]


@cache
def _with_method(method: type[MethodConfig]) -> type[RunConfig]:
    found = make_dataclass("RunConfig", [("method", method, field(default_factory=method))], bases=(RunConfig,))
    found.__doc__ = RunConfig.__doc__
    return found


def full_rank_config(config: RunConfig) -> RunConfig:
    """Return what the full-rank phase before a method trains with (`method.full_rank_steps`).

    It trains every weight: dense tensors that the method freezes train at `method.full_rank_lr`.
    """
    rate = config.method.full_rank_lr
    optim = replace(config.optim, lr=rate, dense_lr=config.dense_lr or rate, lora_plus_ratio=1.0)
    parallel = replace(config.parallel, lte_heads=1)
    return replace(config, method=make_method("full"), optim=optim, parallel=parallel)


def method_config(config: RunConfig) -> RunConfig:
    """What the method trains with after it."""
    steps = config.train.steps - config.method.full_rank_steps
    return replace(config, train=replace(config.train, steps=steps))


def compute_bytes(config: RunConfig) -> int:
    """Bytes of a number in the precision of compute."""
    return 2 if config.train.precision == "bf16" else 4


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
