"""What is text, what is not, and what of a corpus is left out: refused, left out or told, never read in silence."""

from __future__ import annotations

import gzip
import io
import os
import resource
import sqlite3
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest

from megatron_switchlora.config.data import DataConfig
from megatron_switchlora.config.errors import UserError
from megatron_switchlora.data import texts as texts_module
from megatron_switchlora.data.corpus import corpus_identity
from megatron_switchlora.data.files import documents
from megatron_switchlora.data.findings import Findings
from megatron_switchlora.data.packing import prepare

from .test_data_corpus import COMPRESS, load, refused, texts, write_json

ROWS: list[object] = [{"text": "one"}, {"text": "two"}]
NOT_TEXT = (  # noqa: SIM905
    "a.csv a.tsv a.tar a.tgz a.zip a.7z a.npy a.arrow a.pkl a.bin a.pdf a.docx a.h5 a.sqlite a.avro a.orc a.xlsx a.pq "
    "a.zstd a.tar.gz a.csv.zst A.CSV"
).split()
TEXT = "a a.py a.md a.c a.rst a.tex a.txt a.log a.pt a.en Makefile a.jl a.yaml a.jl.gz".split()  # noqa: SIM905
LINES = b'{"text": "one"}\n{"text": "two"}\n'


def zst(content: bytes) -> bytes:
    out = io.BytesIO()
    with pa.CompressedOutputStream(out, "zstd") as stream:
        stream.write(content)
        stream.flush()
        return out.getvalue()


def tar(content: bytes) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        entry = tarfile.TarInfo("a.txt")
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    return out.getvalue()


def table(write: Callable[[pa.Table, io.BytesIO], None]) -> bytes:
    out = io.BytesIO()
    write(pa.table({"text": ["a"]}), out)
    return out.getvalue()


def array(content: bytes) -> bytes:
    out = io.BytesIO()
    np.save(out, np.frombuffer(content, np.uint8))
    return out.getvalue()


# --- names


@pytest.mark.parametrize("name", ["a.ndjson", "a.jsonlines", "a.jl", "A.NDJSON", "a.jl.gz", "a.ndjson.xz"])
def test_json_lines_under_their_other_names(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(COMPRESS.get(path.suffix, bytes)(LINES))
    assert list(documents(path, "text")) == ["one", "two"]


@pytest.mark.parametrize("name", NOT_TEXT)
def test_tables_and_containers_are_refused_by_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("a,b\nplain,text\n")
    data = DataConfig(source="files", files=str(tmp_path / "*"))
    with pytest.raises(UserError, match=rf"data\.files: .*{name}: by its name this is .* no plain text: .*\.txt"):
        corpus_identity(data)  # at the start, before anything is read


@pytest.mark.parametrize("name", TEXT)
def test_everything_else_is_text(tmp_path: Path, name: str) -> None:
    path, content = tmp_path / name, "x = [1]\n# PK ustar \x1b ünï"
    path.write_bytes(COMPRESS.get(path.suffix, bytes)(content.encode()))
    findings = Findings()
    assert list(documents(path, "text", findings)) == [content]
    assert findings.sentences() == []


# --- content


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (gzip.compress(b"text", mtime=0), "gzip"),
        (COMPRESS[".bz2"](b"text"), "bzip2"),
        (COMPRESS[".xz"](b"text"), "xz"),
        (zst(b"text"), "Zstandard"),
        (tar(b"text"), "a tar archive"),
        (b"PK\x03\x04\x14\0\0\0", "a zip archive"),
        (b"%PDF-1.7\n1 0 obj\n", "PDF"),
        (table(pq.write_table), "Parquet"),
        (table(lambda found, out: feather.write_feather(found, out, compression="uncompressed")), "Arrow"),
        (array(b"text"), "a numpy array"),
        (b"SQLite format 3\0", "an SQLite database"),
        ("text".encode("utf-16"), "text in UTF-16"),
        (b"\xfe\xff\0t", "text in UTF-16"),
        ("text".encode("utf-32"), "text in UTF-32"),
        (b"fine\nand a \0 byte\n", "line 2 holds a NUL byte"),
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a", "a.jsonl", "a.txt.gz"])
def test_other_content_under_a_name_of_text(tmp_path: Path, content: bytes, told: str, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    refused(tmp_path, name, "line 1: not JSON" if "NUL" in told and ".jsonl" in name else told, files=str(path))


def test_an_sqlite_database_of_sqlite(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "a") as connection:
        connection.execute("create table t (text text)")
    refused(tmp_path, "an SQLite database by its content", files=str(tmp_path / "a"))


@pytest.mark.parametrize("name", ["a.txt", "a", "b.txt.gz", "a.html"])
def test_json_lines_read_as_text_are_told(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(LINES) if name.endswith(".gz") else b"\n" + LINES * 2 + b'{"text": "cut')
    findings = Findings()
    assert len(list(documents(path, "text", findings))) == 1
    assert f"lines are JSON objects (if these are documents, rename to .jsonl): 1 ({path})." in findings.sentences()[0]


@pytest.mark.parametrize("content", ["{x}\n", "[1]\n", '{"a": 1}\nplain\n', "1\n2\n", "{\n}\n", "{" * 5000])
def test_other_text_is_not_taken_for_json_lines(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.txt").write_text(content)
    findings = Findings()
    assert list(documents(tmp_path / "a.txt", "text", findings)) == [content]
    assert findings.sentences() == []


def test_markup_is_read_and_told(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text("<p>text</p>")
    findings = Findings()
    assert list(documents(tmp_path / "a.html", "text", findings)) == ["<p>text</p>"]
    assert "tags and all" in findings.sentences()[0] and "a.html" in findings.sentences()[0]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.gz", "a.jsonl.gz"])
def test_a_byte_order_mark_at_the_start_is_no_part_of_the_text(tmp_path: Path, name: str) -> None:
    content = b"\xef\xbb\xbf" + (LINES if ".jsonl" in name else "a\ufeffb".encode())
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert list(documents(path, "text")) == (["one", "two"] if ".jsonl" in name else ["a\ufeffb"])


# --- what is left out


def test_documents_without_text_are_left_out_and_told(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "blank.txt").write_text(" \n")
    write_json(tmp_path / "a.jsonl", [{"text": "one"}, {"text": None}, {"text": " "}, {"text": ""}, {"text": "two"}])
    pq.write_table(pa.table({"text": ["x", None, "y"]}), tmp_path / "b.parquet")
    (tmp_path / "v.txt").write_text("held out")
    names = ["empty.txt", "empty.jsonl", "blank.txt", "a.jsonl", "b.parquet"]
    corpus = load(tmp_path, files=[str(tmp_path / name) for name in names], val_files=str(tmp_path / "v.txt"))
    assert texts(corpus.train) == ["one", "two", "x", "y"]
    (told,) = corpus.findings.sentences()
    places = "; ".join(str(tmp_path / name) for name in names[:3])
    assert told == f"Documents without text, left out: 7 ({places}; ...)."


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_an_empty_compressed_file_is_a_damaged_one(tmp_path: Path, suffix: str) -> None:
    good = write_json(tmp_path / "good.jsonl", ROWS)
    (tmp_path / f"a.jsonl{suffix}").touch()
    refused(tmp_path, f"a.jsonl{suffix} is empty (0 bytes)", files=[str(good), str(tmp_path / f"a.jsonl{suffix}")])


BAD = [b'{"content": "a"}', b'{"text": 5}', b'["a"]', b'{"text": "cut', b'{"text": "\xff"}', b'{"text": "\\ud800"}']


def test_documents_that_cannot_be_read_are_left_out_on_request(tmp_path: Path) -> None:
    good = write_json(tmp_path / "a.jsonl", ROWS)
    good.write_bytes(good.read_bytes() + b"\n".join([*BAD, b'{"text": "three"}']))
    for name, content in (("b.txt", b"\xff"), ("c.txt", b"a\0b"), ("d.csv", b"a,b"), ("e.txt", gzip.compress(b"x"))):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "v.txt").write_text("held out")
    files, val = [str(good), str(tmp_path / "?.txt"), str(tmp_path / "d.csv")], str(tmp_path / "v.txt")
    corpus = load(tmp_path, files=files[:1], val_files=val, on_bad_document="skip")
    assert texts(corpus.train) == ["one", "two", "three"]
    (told,) = corpus.findings.sentences()
    assert "(data.on_bad_document skip): 6 (" in told and "a.jsonl, line 3: no field 'text'" in told
    files[1] = str(tmp_path / "[b-e].txt")
    corpus = load(tmp_path / "all", files=files, val_files=val, on_bad_document="skip")
    assert texts(corpus.train) == ["one", "two", "three"]
    assert "): 10 (" in corpus.findings.sentences()[0]
    refused(tmp_path / "1", "a.jsonl, line 3: no field 'text'", "on_bad_document skip", files=files[:1], val_files=val)
    refused(tmp_path / "2", "no document with text in", "d.csv", files=files[2], val_files=val, on_bad_document="skip")


def test_a_damaged_file_is_never_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINES)[:-4])
    refused(tmp_path, "a.jsonl.gz cannot be read", files=str(tmp_path / "a.jsonl.gz"), on_bad_document="skip")
    (tmp_path / "a.parquet").write_bytes(table(pq.write_table)[:-4])
    refused(tmp_path, "a.parquet cannot be read", files=str(tmp_path / "a.parquet"), on_bad_document="skip")


def test_how_files_are_read_identifies_a_corpus(tmp_path: Path) -> None:
    def identity(name: str, **options: object) -> dict[str, object]:
        write_json(tmp_path / name, ROWS)
        return corpus_identity(DataConfig(source="files", files=str(tmp_path / name), **options))  # type: ignore[arg-type]

    for name in ("a.jsonl", "a.json.gz"):  # caches of older versions are found
        assert set(identity(name)) == {"source", "text_field", "train", "val"}
    for name in ("a.ndjson", "a.txt", "a.jl.gz"):  # these were read otherwise
        assert identity(name)["reading"] == 2
    assert identity("a.jsonl", on_bad_document="skip") != identity("a.jsonl")


def test_what_was_left_out_is_told_once(tmp_path: Path) -> None:
    (tmp_path / "v.txt").write_text("one two\n")
    path = write_json(tmp_path / "a.jsonl", [*ROWS, {"text": None}])
    os.rename(path, strange := os.fsencode(tmp_path) + b"/\xff.jsonl")
    data = DataConfig(source="files", files=os.fsdecode(strange), val_files=str(tmp_path / "v.txt"), vocab_size=300)
    data.cache_dir = str(tmp_path / "cache")
    assert prepare(data).notes == [f"Documents without text, left out: 1 ({tmp_path}/\\udcff.jsonl, line 3)."]
    assert prepare(data).notes == []


# --- fields


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"meta": {"text": "a"}}, ["a"]),
        ({"meta.text": "whole", "meta": {"text": "a"}}, ["whole"]),
        ({"meta": {"text": None}}, []),
        ({"meta": None}, []),
    ],
)
def test_a_field_within_an_object(tmp_path: Path, row: object, found: list[str]) -> None:
    path = write_json(tmp_path / "a.jsonl", [row])
    assert list(documents(path, "meta.text")) == found


@pytest.mark.parametrize("row", [{"meta": {"other": "a"}}, {"meta": "text"}, {"meta": ["text"]}, {"other": 1}])
def test_a_field_that_is_not_there(tmp_path: Path, row: object) -> None:
    path = write_json(tmp_path / "a.jsonl", [row])
    refused(tmp_path, "line 1: no field 'meta.text' (there are:", files=str(path), text_field="meta.text")


# --- size


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz", "a.jsonl"])
def test_no_document_is_larger_than_any(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(texts_module, "LONGEST", 1 << 20)
    path, content = tmp_path / name, LINES[:16] + b'{"text": "' + b"x" * (1 << 20) + b'"}\n'
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    place = f"{name}, line 2" if ".jsonl" in name else name
    refused(tmp_path, f"{place}: longer than 1 MiB", files=str(path))
    (tmp_path / "plain.txt").write_bytes(content)  # its size can be seen
    assert len(list(documents(tmp_path / "plain.txt", "text"))) == 1


def test_too_little_memory(tmp_path: Path) -> None:
    """A bomb of some kB, under a limit that it breaks before it is found to be longer than any document."""
    for name, head in (("a.txt.zst", b""), ("a.jsonl.zst", b'{"text": "')):
        with pa.CompressedOutputStream(str(tmp_path / name), "zstd") as stream:
            stream.write(head)
            for _ in range(600):
                stream.write(b"x" * (1 << 20))
        limits = resource.getrlimit(resource.RLIMIT_AS)
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        try:
            resource.setrlimit(resource.RLIMIT_AS, (now + (300 << 20), limits[1]))
            with pytest.raises(UserError, match=rf"{name} cannot be read: a document in it needs more memory"):
                list(documents(tmp_path / name, "text"))
        finally:
            resource.setrlimit(resource.RLIMIT_AS, limits)
