"""What a run warns of before it trains: options that change nothing, and a vocabulary that is mostly unused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from megatron_switchlora.config.command_line import parse_arguments
from megatron_switchlora.train.dataset import vocabulary_notes
from megatron_switchlora.train.pretrain import unused_warnings


def test_a_shipped_configuration_trains_on_files_of_ones_own() -> None:
    """Its limits of a hub dataset are without effect, which is reported."""
    words = ["--config", "llama_130m", "--data.source", "files", "--data.files", "x"]
    (warning,) = unused_warnings(parse_arguments(words).config)
    assert warning == "data.max_val_documents: without effect in data.source files."
    assert unused_warnings(parse_arguments(["--config", "llama_130m"]).config) == []


@pytest.mark.parametrize(("size", "tokens", "noted"), [(32_100, 2048, True), (32_128, 32_100, False), (None, 9, False)])
def test_a_vocabulary_that_is_mostly_unused_is_noted(size: Any, tokens: int, noted: bool) -> None:
    config = parse_arguments(["--model.vocab_size", "null" if size is None else str(size)]).config
    notes = vocabulary_notes(config, SimpleNamespace(vocab_size=tokens))  # type: ignore[arg-type]
    assert len(notes) == noted
    assert not noted or "so 30052 rows of embedding and lm_head are never used" in notes[0]
