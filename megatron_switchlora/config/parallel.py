"""The mesh section of the run configuration, its rules, and how a dimension is split."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_switchlora.config.errors import require
from megatron_switchlora.config.facts import option


@dataclass
class ParallelConfig:
    """Mesh sizes; the data-parallel size is what remains of the world."""

    lte_heads: int = option(1, resume="free")
    """Groups of ranks that each train LTE heads of their own, the outermost axis; each has method.lte.local_heads
    heads. A resumed run may change the number of heads right after a merge."""
    tp: int = option(1, resume="free", results=False, basic=True)
    """Tensor-parallel ranks, the innermost axis. Attention and key/value heads must divide; other sizes are padded."""
    start_timeout: float = option(300.0, resume="free", results=False)
    """Seconds that ranks wait for one another at the start."""
    timeout: float = option(300.0, resume="free", results=False)
    """Seconds, at least 1, after which a rank that is stopped, gone, or absent from a collective is reported with its
    host, and all ranks end. What one rank does alone (data, checkpoints, export) may take longer while it lives."""


def check_parallel(p: ParallelConfig) -> None:
    """Check the rules of this section alone.

    Raises:
        UserError: with the rule, the values and what to change.
    """
    for name in ("lte_heads", "tp"):
        value = getattr(p, name)
        require(value >= 1, f"parallel.{name} must be at least 1, not {value}.")
    for name in ("start_timeout", "timeout"):
        wait = getattr(p, name)
        require(
            0 < wait <= 604_800, f"parallel.{name} must be above 0 and at most 604800 seconds, a week; it is {wait}."
        )
    require(p.timeout >= 1, f"parallel.timeout must be at least 1 second, not {p.timeout}: 300 suits most.")


def shard_size(size: int, ranks: int, multiple: int = 1) -> int:
    """Return how much of a dimension each of `ranks` holds, padded to a multiple of `multiple`."""
    share = -(-size // ranks)
    return -(-share // multiple) * multiple


def require_shard(name: str, size: int, tp: int) -> None:
    """Require that every tensor-parallel rank holds something real of a padded dimension.

    Raises:
        UserError: the last rank's shard would be padding alone.
    """
    shard = shard_size(size, tp)
    require(
        shard * (tp - 1) < size,
        f"{name} {size} over parallel.tp {tp} gives shards of {shard}, so the last rank holds only padding: lower "
        "parallel.tp.",
    )
