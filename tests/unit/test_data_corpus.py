"""Which documents come out of which files."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import random
import sysconfig
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pytest

from megatron_switchlora.config.data import DataConfig
from megatron_switchlora.config.errors import UserError
from megatron_switchlora.data import corpus as corpus_module
from megatron_switchlora.data.corpus import Corpus, corpus_identity, load_corpus

COMPRESS: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
BOOKS = Path(__file__).parents[3] / "shared/data/books"


def load(tmp_path: Path, **options: object) -> Corpus:
    return load_corpus(DataConfig(**{"source": "files", **options}), tmp_path / "scratch")  # type: ignore[arg-type]


def texts(dataset: datasets.Dataset) -> list[str]:
    return list(dataset["text"])


def write_json(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def refused(tmp_path: Path, *parts: str, **options: object) -> None:
    with pytest.raises(UserError) as caught:
        load(tmp_path, **options)
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


# --- the standard library


def test_stdlib_holds_out_whole_files_and_leaves_tests_out(tmp_path: Path) -> None:
    data = DataConfig(max_bytes=400_000)
    corpus = load_corpus(data, tmp_path)
    train, val = set(texts(corpus.train)), set(texts(corpus.val))
    assert train and val and not train & val
    assert sum(len(text.encode()) for text in train | val) <= 400_000
    root = Path(sysconfig.get_path("stdlib"))
    names = [name for name, _ in corpus.identity["files"]]  # type: ignore[attr-defined]
    assert names == sorted(names)
    assert val == {(root / name).read_bytes().decode() for name in names[10::20]}
    everything = [name for name, _ in corpus_module._stdlib_files(10**9)]
    assert len(everything) > 300
    for name in everything:
        assert not {"test", "tests", "idle_test", "site-packages", "__pycache__"} & set(name.split("/")[:-1])


def fake_stdlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "lib"
    root.mkdir()
    monkeypatch.setattr(corpus_module.sysconfig, "get_path", lambda name: str(root))
    return root


def test_stdlib_stops_before_the_limit_and_skips_other_encodings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = fake_stdlib(tmp_path, monkeypatch)
    for i in range(30):
        (root / f"m{i:02}.py").write_bytes(b"%02d-5678\r\n" % i)
    (root / "m03.py").write_bytes(b"# caf\xe9 45\n")
    (root / "m04.py").write_bytes(b"\n")
    for folder in ("test", "site-packages", "pkg/tests"):
        (root / folder).mkdir(parents=True)
        (root / folder / "a.py").write_text("outside")
    corpus = load_corpus(DataConfig(max_bytes=20 * 9 + 10 + 1), tmp_path / "scratch")
    assert texts(corpus.train) == [f"{i:02}-5678\r\n" for i in range(22) if i not in (3, 4, 10)]
    assert texts(corpus.val) == ["10-5678\r\n"]


def test_stdlib_without_sources_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = fake_stdlib(tmp_path, monkeypatch)
    with pytest.raises(UserError, match="No source of Python's standard library"):
        corpus_identity(DataConfig())
    (root / "a.py").write_text("x = 1\n")
    with pytest.raises(UserError, match=r"hold one out; data\.max_bytes 10000000 gives 1"):
        load_corpus(DataConfig(), tmp_path / "scratch")


# --- what is read


def test_plain_text_is_one_exact_document_a_file(tmp_path: Path) -> None:
    contents = ["  first\r\nline\rold mac\n\n\ttab \n", "ünïcödé 日本 🎉\n\u2028no newline at the end"]
    for name, content in zip(("b.txt", "a.md"), contents, strict=True):
        (tmp_path / name).write_bytes(content.encode())
    (tmp_path / "v.txt").write_text("held out")
    corpus = load(tmp_path, files=[str(tmp_path / "b.txt"), str(tmp_path / "a.md")], val_files=str(tmp_path / "v.txt"))
    assert texts(corpus.train) == contents
    assert texts(corpus.val) == ["held out"]
    assert corpus.train.column_names == ["text"]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".json.gz", ".jsonl.bz2", ".json.xz", ".jsonl.zst", ".txt.gz"])
def test_every_form_is_read(tmp_path: Path, suffix: str) -> None:
    rows = [{"text": "one\r\n two", "url": "u"}, {"url": "v", "text": "2020-01-01", "more": [1]}, {"text": ""}]
    plain = "".join(json.dumps(row) + "\n\n" for row in rows).encode()
    path = tmp_path / f"c4{suffix}"
    if suffix.endswith(".zst"):
        with pa.CompressedOutputStream(str(path), "zstd") as stream:
            stream.write(plain)
    else:
        path.write_bytes(COMPRESS.get(path.suffix, bytes)(plain))
    (tmp_path / "v.txt").write_text("held out")
    corpus = load(tmp_path, files=[str(path)], val_files=[str(tmp_path / "v.txt")])
    assert texts(corpus.train) == ([plain.decode()] if ".txt" in suffix else ["one\r\n two", "2020-01-01"])


def test_byte_order_mark_text_field_and_links(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"\xef\xbb\xbf" + b'{"content": "a", "text": 5}\n{"content": "b"}\n')
    (tmp_path / "v.txt").write_text("held out")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "blob")
    corpus = load(tmp_path, files=str(tmp_path / "link.jsonl"), val_files=str(tmp_path / "v.txt"), text_field="content")
    assert texts(corpus.train) == ["a", "b"]


def test_patterns_are_sorted_recursive_unique_and_expand_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "sub/deep").mkdir(parents=True)
    for name in ("sub/b.txt", "sub/a.txt", "sub/deep/c.txt", "[x].txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "v.txt").write_text("held out")
    corpus = load(tmp_path, files=["~/sub/**/*.txt", "~/sub/a.txt", "~/[x].txt"], val_files=["~/v.txt"])
    assert texts(corpus.train) == ["sub/a.txt", "sub/b.txt", "sub/deep/c.txt", "[x].txt"]


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5, 0.75])
@pytest.mark.parametrize("lengths", [[1000], [10, 90, 7, 893], [500, 500], [1, 1, 998]])
def test_held_out_text_is_the_end_by_characters(tmp_path: Path, lengths: list[int], fraction: float) -> None:
    rng = random.Random(0)
    documents = ["".join(rng.choices("aé日🎉\n", k=n - 1)) + "x" for n in lengths]
    path = write_json(tmp_path / "a.jsonl", [{"text": text} for text in documents])
    corpus = load(tmp_path, files=[str(path)], val_fraction=fraction)
    whole, cut = "".join(documents), int(1000 * (1 - fraction))
    assert "".join(texts(corpus.train)) == whole[:cut]
    assert "".join(texts(corpus.val)) == whole[cut:]
    assert all(texts(corpus.train)) and all(texts(corpus.val))
    assert len(corpus.train) + len(corpus.val) <= len(documents) + 1


def test_too_little_to_hold_out_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    refused(tmp_path, "1 characters", "val_fraction 0.1", "val_files", files=[str(tmp_path / "a.txt")])


# --- identity


def test_identity_changes_with_what_matters(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("some text")

    def identity(**options: object) -> str:
        return json.dumps(corpus_identity(DataConfig(source="files", files=[str(path)], **options)))  # type: ignore[arg-type]

    first = identity()
    assert identity() == first
    assert identity(val_fraction=0.2) != first
    assert identity(text_field="content") != first
    os.utime(path, ns=(1, 1))
    second = identity()
    assert second != first
    path.write_text("some texts")
    os.utime(path, ns=(1, 1))
    assert identity() != second
    stdlib = corpus_identity(DataConfig(max_bytes=100_000))
    assert stdlib != corpus_identity(DataConfig(max_bytes=400_000))


def test_identity_does_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("some text")

    def no_reading(*args: object, **kwargs: object) -> None:
        raise AssertionError("read")

    monkeypatch.setattr(Path, "open", no_reading)
    monkeypatch.setattr(Path, "read_bytes", no_reading)
    corpus_identity(DataConfig(max_bytes=100_000))
    corpus_identity(DataConfig(source="files", files=[str(tmp_path / "a.txt")]))


def test_progress_bars_show_when_asked_and_are_left_as_they_were(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus_module, "shows_progress", lambda: True)  # as on a terminal
    (tmp_path / "a.txt").write_text("some text")
    data = DataConfig(source="files", files=str(tmp_path / "a.txt"))
    load_corpus(data, tmp_path / "quiet")
    assert "Generating" not in capfd.readouterr().err
    assert not datasets.are_progress_bars_disabled()
    load_corpus(data, tmp_path / "loud", progress=True)
    assert "Generating" in capfd.readouterr().err


@pytest.mark.skipif(not BOOKS.is_dir(), reason="needs ../shared/data/books")
def test_c4_files(tmp_path: Path) -> None:
    path = BOOKS / "c4-validation.00000-of-00001.json.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        expected = [json.loads(line)["text"] for line in file]
    corpus = load(tmp_path, files=[str(path)], val_fraction=0.2)
    assert len(expected) == 602
    assert "".join(texts(corpus.train) + texts(corpus.val)) == "".join(expected)
    assert texts(corpus.train)[:400] == expected[:400]
