"""What is in the token files: every document exactly, and the statistics."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_switchlora.config.data import DataConfig
from megatron_switchlora.config.errors import UserError
from megatron_switchlora.data import packing
from megatron_switchlora.data.loader import TokenStore
from megatron_switchlora.data.packing import PreparedData, prepare
from tests.hf_tokenizers import llama_like

SHAKESPEARE = Path(__file__).parents[3] / "shared/data/shakespeare/input.txt"
TRAIN = ["the cat sat on the mat, the end.\n" * 5, "a dog  ran\r\n\tto the cat\n" * 3, "ünï 日本 🎉"]
VAL = ["the dog sat.\n", "日本 a mat 🎉\n" * 4]


def config(folder: Path) -> DataConfig:
    """The little corpus written to a folder; without a cache_dir."""
    for name, texts in (("train", TRAIN), ("val", VAL)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return DataConfig(
        source="files", files=str(folder / "train.jsonl"), val_files=str(folder / "val.jsonl"), vocab_size=300
    )


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataConfig:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return config(tmp_path)


def tokens(store: TokenStore) -> np.ndarray:
    return store[:]


def documents(prepared: PreparedData, store: TokenStore) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(prepared.tokenizer_dir)
    found: list[list[int]] = [[]]
    for token in tokens(store).tolist():
        if token == tokenizer.eos_token_id:
            found.append([])
        else:
            found[-1].append(token)
    assert found.pop() == []
    return [str(tokenizer.decode(ids)) for ids in found]


def test_documents_come_back_exactly(data: DataConfig, tmp_path: Path) -> None:
    prepared = prepare(data, progress=False)
    assert prepared.folder.parent == tmp_path / "xdg/megatron_switchlora"
    assert len(prepared.folder.name) == 20
    assert documents(prepared, prepared.train) == TRAIN
    assert documents(prepared, prepared.val) == VAL
    assert {path.name for path in prepared.folder.iterdir()} == {"train.npy", "val.npy", "tokenizer", "meta.json"}
    assert list(prepared.folder.parent.iterdir()) == [prepared.folder]  # nothing else is left


def test_tokens_are_those_of_the_tokenizer(data: DataConfig) -> None:
    prepared = prepare(data)
    tokenizer = AutoTokenizer.from_pretrained(prepared.tokenizer_dir)
    expected: list[int] = []
    for text in TRAIN:
        expected += [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert tokens(prepared.train).tolist() == expected
    assert prepared.train.num_tokens == len(expected)
    assert prepared.vocab_size == len(tokenizer)


def test_a_begin_mark_before_every_document(data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One a document, in another cache: of a tokenizer that has one, and of a built one whose pieces are cut."""
    monkeypatch.setattr(packing, "PIECE", 40)
    for name, begin in (("bpe", 0), (str(llama_like(tmp_path / "llama")), 1)):
        plain = prepare(replace(data, tokenizer=name))
        begun = prepare(replace(data, tokenizer=name, add_bos=True))
        assert begun.folder != plain.folder
        tokenizer = AutoTokenizer.from_pretrained(begun.tokenizer_dir)
        end = tokenizer.eos_token_id
        for texts, ours in ((TRAIN, begun.train), (VAL, begun.val)):
            expected = [[begin, *tokenizer(text, add_special_tokens=False)["input_ids"], end] for text in texts]
            assert tokens(ours).tolist() == [token for document in expected for token in document]
            assert [[*tokenizer(text)["input_ids"], end] for text in texts] == expected
    with pytest.raises(UserError, match="add_bos needs a tokenizer with a begin mark"):
        prepare(replace(data, tokenizer=str(llama_like(tmp_path / "endless", begin=False)), add_bos=True))


def test_statistics(data: DataConfig) -> None:
    prepared = prepare(data)
    train, val = tokens(prepared.train).tolist(), tokens(prepared.val).tolist()
    counts, size = Counter(train), prepared.vocab_size
    nll = [-math.log((counts[token] + 1) / (len(train) + size)) for token in val]
    assert prepared.unigram_val_ppl == pytest.approx(math.exp(sum(nll) / len(nll)), rel=1e-12)
    assert prepared.bytes_per_val_token == sum(len(text.encode()) for text in VAL) / len(val)


@pytest.mark.parametrize("kind", ["bpe", "char"])
def test_cutting_long_documents_changes_no_token(data: DataConfig, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    data.tokenizer = kind
    whole = prepare(data)
    monkeypatch.setattr(packing, "PIECE", 7)
    monkeypatch.setattr(packing, "BATCH", 20)
    data.cache_dir = str(whole.folder.parent / "other")
    cut = prepare(data)
    assert np.array_equal(tokens(cut.train), tokens(whole.train))
    assert np.array_equal(tokens(cut.val), tokens(whole.val))


def test_a_named_tokenizer_gets_whole_documents(data: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare(data)
    tokenizer = AutoTokenizer.from_pretrained(first.tokenizer_dir)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)  # cuts would show
    tokenizer.save_pretrained(first.tokenizer_dir)
    data.tokenizer = str(first.tokenizer_dir)
    whole = tokens(prepare(data).train)
    monkeypatch.setattr(packing, "PIECE", 7)
    data.cache_dir = str(first.folder.parent / "other")
    assert np.array_equal(tokens(prepare(data).train), whole)
    assert len(whole) > first.train.num_tokens  # the prefixes are there


def test_pieces_make_up_the_documents() -> None:
    rows = [{"text": text} for text in [*TRAIN, "x" * 50, "\n\n\n  \n", "\n", "a\n"]]
    pieces = list(packing._pieces(rows, 7))
    assert len(pieces) > len(rows) + 5
    joined = [""]
    for text, last in pieces:
        joined[-1] += text
        joined += [""] * last
    assert joined[:-1] == [row["text"] for row in rows]
    for (text, last), (following, _) in pairwise(pieces):
        assert last or (not text[-1].isspace() and following[0] == "\n")
    assert [text for text, _ in packing._pieces(rows, None)] == [row["text"] for row in rows]


def test_a_large_corpus_trains_bpe_on_an_even_share(data: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[str] = []
    original = packing.build_tokenizer

    def spy(data: DataConfig, texts: Iterator[str], progress: bool) -> PreTrainedTokenizerFast:
        given.extend(texts)
        return original(data, iter(given))

    monkeypatch.setattr(packing, "build_tokenizer", spy)
    monkeypatch.setattr(packing, "PIECE", 7)
    monkeypatch.setattr(packing, "TRAINING_CHARACTERS", sum(map(len, TRAIN)) // 2)
    prepare(data)
    pieces = [text for text, _ in packing._pieces([{"text": text} for text in TRAIN], 7)]
    assert given == pieces[::3]
    given.clear()
    data.tokenizer = "char"
    prepare(data)
    assert given == pieces


def test_dtype_follows_the_vocabulary(data: DataConfig, tmp_path: Path) -> None:
    data.files, data.tokenizer = str(tmp_path / "all.txt"), "char"
    for size, dtype in ((65535, np.uint16), (65536, np.uint32)):
        text = "".join(map(chr, range(0x10000, 0x10000 + size - 2)))
        (tmp_path / "all.txt").write_text(text, encoding="utf-8")
        (tmp_path / "val.jsonl").write_text(json.dumps({"text": f"x{text[0]}"}))  # one of them is unknown
        prepared = prepare(data)
        assert (prepared.vocab_size, tokens(prepared.train).dtype) == (size, dtype)
        assert tokens(prepared.train).tolist() == list(range(size - 1))
        assert tokens(prepared.val).max() == size - 1  # "<unk>", the last entry


def test_a_tokenizer_that_would_truncate_or_add_marks_does_not(data: DataConfig, tmp_path: Path) -> None:
    first = prepare(data)
    tokenizer = AutoTokenizer.from_pretrained(first.tokenizer_dir)
    tokenizer.backend_tokenizer.enable_truncation(5)
    tokenizer.backend_tokenizer.enable_padding(length=1000)
    tokenizer.backend_tokenizer.save(str(first.tokenizer_dir / "tokenizer.json"))
    data.tokenizer = str(first.tokenizer_dir)
    assert np.array_equal(tokens(prepare(data).train), tokens(first.train))


def test_a_tokenizer_with_gaps_is_refused(data: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    original = packing.build_tokenizer

    class Short(PreTrainedTokenizerFast):
        def __len__(self) -> int:
            return 100

    def short(data: DataConfig, texts: Iterator[str], progress: bool = False) -> PreTrainedTokenizerFast:
        tokenizer = original(data, texts)
        tokenizer.__class__ = Short
        return tokenizer

    monkeypatch.setattr(packing, "build_tokenizer", short)
    with pytest.raises(UserError, match="has only 100 entries"):
        prepare(data)


@pytest.mark.parametrize("victim", ["train", "val"])
def test_a_text_of_unknown_characters_only(data: DataConfig, tmp_path: Path, victim: str) -> None:
    data.tokenizer = "char"
    if victim == "train":  # a tokenizer from elsewhere
        data.tokenizer = str(prepare(data).tokenizer_dir)
    (tmp_path / f"{victim}.jsonl").write_text(json.dumps({"text": "ЖЖЖ"}))
    name = {"train": "training", "val": "validation"}[victim]
    with pytest.raises(UserError, match=rf"The {name} text holds nothing but .* each of its tokens is <unk>"):
        prepare(data)


def test_no_array_of_objects_is_loaded(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match=r"a\.npy cannot be read \(its header"):
        TokenStore(tmp_path / "a.npy", 10)


@pytest.mark.skipif(not SHAKESPEARE.is_file(), reason="needs ../shared/data/shakespeare")
def test_tiny_shakespeare_by_characters(tmp_path: Path) -> None:
    text = SHAKESPEARE.read_text(encoding="utf-8")
    start = time.perf_counter()
    prepared = prepare(DataConfig(source="files", files=str(SHAKESPEARE), tokenizer="char", cache_dir=str(tmp_path)))
    assert time.perf_counter() - start < 20
    assert prepared.vocab_size == 65 + 2
    cut = int(len(text) * 0.9)
    assert (prepared.train.num_tokens, prepared.val.num_tokens) == (cut + 1, len(text) - cut + 1)
    alphabet = np.array(sorted(set(text)))
    assert "".join(alphabet[tokens(prepared.train)[:-1]]) == text[:cut]
    assert "".join(alphabet[tokens(prepared.val)[:-1]]) == text[cut:]
    assert prepared.bytes_per_val_token == pytest.approx(1, abs=1e-4)
