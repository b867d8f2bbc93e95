"""What the shape of a model must fulfil: of a run's configuration, and of a model that is imported."""

from __future__ import annotations

import math

from megatron_switchlora.config.errors import require
from megatron_switchlora.config.family import find_family
from megatron_switchlora.config.run import ModelConfig

LARGEST_SIZE = 2**24  # of a model's dimension: the elements of a matrix can still be counted


def check_model(m: ModelConfig) -> None:
    """Check every rule of the model's shape alone: those of all families, then those of its own.

    Raises:
        UserError: with the rule, the values and what to change.
    """
    for name in ("hidden_size", "intermediate_size", "num_layers", "num_heads"):
        value = getattr(m, name)
        require(1 <= value <= LARGEST_SIZE, f"model.{name} must be at least 1 and at most 2^24, not {value}.")
    for name in ("initializer_range", "rope_theta", "rms_norm_eps"):
        number = getattr(m, name)
        require(math.isfinite(number) and number > 0, f"model.{name} must be positive, not {number}.")
    length = m.max_position_embeddings
    require(length is None or length >= 1, f"model.max_position_embeddings must be at least 1, not {length}.")
    vocabulary = m.vocab_size
    require(
        vocabulary is None or 1 <= vocabulary <= LARGEST_SIZE,
        f"model.vocab_size must be positive and at most 2^24, not {vocabulary}.",
    )
    find_family(m.family).check(m)
