"""Parquet files: every row's text as it stands, and every fault found."""

from __future__ import annotations

import gzip
import random
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_switchlora.data import parquet
from megatron_switchlora.data.files import documents
from megatron_switchlora.data.findings import Findings

from .test_data_corpus import load, refused, texts, write_json

TEXTS = ["one\r\n two", "ünï 日本 🎉\u2028", "2020-01-01", "5", "\n", "", "last"]
LETTERS = [f"document {i} " + random.Random(i).randbytes(50).hex() for i in range(300)]


def write(path: Path, columns: dict[str, object], **options: object) -> Path:
    pq.write_table(pa.table(columns), path, **options)
    return path


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
def test_rows_are_documents(tmp_path: Path, kind: pa.DataType, compression: str) -> None:
    columns = {"url": ["u"] * len(TEXTS), "text": pa.array(TEXTS, kind), "list": [[1]] * len(TEXTS)}
    path = write(tmp_path / "a.parquet", columns, row_group_size=3, compression=compression)
    (tmp_path / "v.txt").write_text("held out")
    corpus = load(tmp_path, files=str(path), val_files=str(tmp_path / "v.txt"))
    assert texts(corpus.train) == [text for text in TEXTS if text.strip()]


def test_other_column_names_beside_json_lines_and_as_validation(tmp_path: Path) -> None:
    first = write_json(tmp_path / "1.jsonl", [{"a.b": "json", "text": 5}])
    second = write(tmp_path / "2.PARQUET", {"a.b": ["row"], "text": [5]})
    third = write(tmp_path / "3.parquet", {"a.b": ["held out"]})
    corpus = load(tmp_path, files=[str(first), str(second)], val_files=str(third), text_field="a.b")
    assert (texts(corpus.train), texts(corpus.val)) == (["json", "row"], ["held out"])


@pytest.mark.parametrize("rows", [1, 7, 1024])
def test_batches_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(parquet, "ROWS", rows)
    path = write(tmp_path / "a.parquet", {"text": LETTERS}, row_group_size=100)
    assert list(documents(path, "text")) == LETTERS


def test_a_row_group_need_not_fit_into_memory(tmp_path: Path) -> None:
    rows = [random.Random(i).randbytes(1000).hex() for i in range(20_000)]
    path = write(tmp_path / "a.parquet", {"text": rows}, use_dictionary=False, compression="none")
    assert pq.ParquetFile(path).num_row_groups == 1
    before = pa.total_allocated_bytes()
    tracemalloc.start()  # sees what is read from the file, Arrow's own pool what is decoded
    decoded = max(pa.total_allocated_bytes() - before for _ in documents(path, "text"))
    most = decoded + tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 10_000_000 < path.stat().st_size / 3


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.large_string())])
def test_a_field_of_a_column_of_structs(tmp_path: Path, kind: pa.DataType) -> None:
    inner = pa.StructArray.from_arrays([pa.array(["a", "b", None]).cast(kind), pa.array([1, 2, 3])], ["text", "n"])
    meta = pa.StructArray.from_arrays([inner], ["in.ner"])
    path = write(tmp_path / "a.parquet", {"meta": inner, "deep": pa.StructArray.from_arrays([inner], ["in"])})
    for name in ("meta.text", "deep.in.text"):
        findings = Findings()
        assert list(documents(path, name, findings)) == ["a", "b"]
        assert "left out: 1 (" in findings.sentences()[0] and "row group 0, row 2" in findings.sentences()[0]
    path = write(tmp_path / "b.parquet", {"meta": inner, "meta.text": ["whole", "name", "wins"]})
    assert list(documents(path, "meta.text")) == ["whole", "name", "wins"]
    nulls = pa.array([{"text": "a"}, None, {"text": "b"}])
    assert list(documents(write(tmp_path / "c.parquet", {"meta": nulls}), "meta.text")) == ["a", "b"]
    path = write(tmp_path / "d.parquet", {"meta": meta})
    refused(tmp_path, "no column 'meta.text' (there are in 'meta': 'in.ner')", files=str(path), text_field="meta.text")


@pytest.mark.parametrize("rows", [2, 1024])
def test_dictionary_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(parquet, "ROWS", rows)
    column = pa.array(["a", None, "b", "a", "c"]).dictionary_encode()
    path = write(tmp_path / "a.parquet", {"text": column}, row_group_size=3)
    assert pa.types.is_dictionary(pq.ParquetFile(path).schema_arrow.field("text").type)
    assert list(documents(path, "text")) == ["a", "b", "a", "c"]


# --- damage


def test_two_columns_of_one_name(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), path)
    refused(tmp_path, "a.parquet: 2 columns are named 'text'", files=str(path))


def test_rows_that_cannot_be_read_are_left_out_on_request(tmp_path: Path) -> None:
    offsets, content = pa.array([0, 1, 3, 4], pa.int32()).buffers()[1], pa.py_buffer(b"a\xff\xfeb")
    path = write(tmp_path / "a.parquet", {"text": pa.Array.from_buffers(pa.string(), 3, [None, offsets, content])})
    findings = Findings(skip=True)
    assert list(documents(path, "text", findings)) == ["a", "b"]
    assert "row group 0, row 1: not UTF-8" in findings.sentences()[0]


@pytest.mark.parametrize(
    ("columns", "parts"),
    [
        ({"content": ["a"], "url": ["u"]}, ["no column 'text'", "'content', 'url'", "data.text_field"]),
        ({"text": [5]}, ["'text' holds int64", "not strings", "data.text_field"]),
        ({"text": [["a"]]}, ["'text' holds list", "not strings"]),
        ({"text": [b"a"]}, ["'text' holds binary", "not strings"]),
        ({"text": pa.array([None], pa.null())}, ["'text' holds null", "not strings"]),
    ],
)
def test_columns_that_hold_no_text(tmp_path: Path, columns: dict[str, object], parts: list[str]) -> None:
    good = write(tmp_path / "good.parquet", {"text": ["fine"]})
    bad = write(tmp_path / "bad.parquet", columns, row_group_size=2)
    refused(tmp_path, "bad.parquet", *parts, files=[str(good), str(bad)])
    refused(tmp_path, "bad.parquet", *parts, files=str(good), val_files=str(bad))


def test_bytes_that_are_no_utf8(tmp_path: Path) -> None:
    offsets, content = pa.array([0, 1, 3], pa.int32()).buffers()[1], pa.py_buffer(b"a\xff\xfe")
    column = pa.Array.from_buffers(pa.string(), 2, [None, offsets, content])
    path = write(tmp_path / "a.parquet", {"text": column})
    refused(tmp_path, "a.parquet, row group 0, row 1", "not UTF-8", files=str(path))


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
def test_cut_off_anywhere(tmp_path: Path, compression: str) -> None:
    path = write(tmp_path / "cut.parquet", {"text": LETTERS}, row_group_size=100, compression=compression)
    whole = path.read_bytes()
    for length in [*range(1, len(whole) - 1, 997), len(whole) - 1]:
        path.write_bytes(whole[:length])
        refused(tmp_path, "cut.parquet cannot be read", "cut off", "fetch it again", files=str(path))


def test_flipped_bits_under_checksums_and_other_files(tmp_path: Path) -> None:
    path = write(tmp_path / "bad.parquet", {"text": LETTERS}, compression="none", write_page_checksum=True)
    whole = path.read_bytes()
    for place in (whole.index(b"document 150"), 2 * len(whole) // 3):
        changed = bytearray(whole)
        changed[place] ^= 1
        path.write_bytes(changed)
        refused(tmp_path, "bad.parquet cannot be read", "fetch it again", files=str(path))
    path.write_bytes(b"plain text, no Parquet")
    refused(tmp_path, "bad.parquet cannot be read", files=str(path))
    (tmp_path / "whole.parquet.gz").write_bytes(gzip.compress(whole))
    refused(tmp_path, "whole.parquet.gz", "compressed inside", files=str(tmp_path / "whole.parquet.gz"))
    (tmp_path / "empty.parquet").touch()
    refused(tmp_path, "empty.parquet is empty", files=str(tmp_path / "empty.parquet"))
