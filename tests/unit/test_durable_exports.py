"""Exports, imports and a run's final model: on the disk before they get their name, readable as the umask says."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from megatron_switchlora.checkpoint.files import Checkpoint
from megatron_switchlora.hf.export import export_dense, export_peft
from megatron_switchlora.hf.model_card import CardFacts
from megatron_switchlora.hf.start import import_model
from megatron_switchlora.train.results import _export, write_tokenizer
from tests.hf_tokenizers import TEMPLATES, llama_like
from tests.plain import VOCAB
from tests.unit.test_convert import save, trained


class Made:
    """A run that has trained, as it would write its final model, its checkpoint and an export."""

    def __init__(self, folder: Path) -> None:
        self.run = trained("lora")
        self.checkpoint: Checkpoint = save(self.run, folder / "step")
        export_dense(self.checkpoint, folder / "hf")
        self.tokenizer = llama_like(folder / "hf", chat_template=TEMPLATES)

    def final(self, out: Path) -> None:
        beside = write_tokenizer(self.tokenizer, out.parent / "tokenizer", False, {})
        config = self.run.config
        facts = CardFacts("run", config.model, VOCAB, config, 6, None)
        _export(self.run.model, out, config.train.seq_len, beside, facts)

    def kinds(self) -> dict[str, Callable[[Path], Any]]:
        return {
            "final": self.final,
            "dense": lambda out: export_dense(self.checkpoint, out, limit=20_000),
            "peft": lambda out: export_peft(self.checkpoint, out),
            "import": lambda out: import_model(self.tokenizer, out),
        }


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("made"))


@pytest.mark.parametrize("mask", [0o022, 0o027])
@pytest.mark.parametrize("kind", ["final", "dense", "peft", "import"])
def test_folders_are_durable_and_readable(
    made: Made, kind: str, mask: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[int] = set()
    out = tmp_path / "final"
    monkeypatch.setattr(os, "fsync", lambda handle: synced.add(0 if out.exists() else os.fstat(handle).st_ino))
    before = os.umask(mask)
    try:
        made.kinds()[kind](out)
    finally:
        os.umask(before)
    files = [path for path in out.rglob("*") if path.is_file()]
    assert len(files) > 3
    assert not [path for path in [*out.rglob("*"), out] if path.stat().st_ino not in synced]
    assert 0 in synced  # the folder around, after the name is given
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o666 & ~mask}
    if kind == "final":
        assert AutoTokenizer.from_pretrained(out).chat_template == TEMPLATES
