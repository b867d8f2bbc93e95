"""No mistaken name and no damaged file passes: each is refused with its name, its place and what to do."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import pyarrow as pa
import pytest

from megatron_switchlora.data import files as files_module

from .test_data_corpus import COMPRESS, refused, write_json


def test_names_that_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    good = write_json(tmp_path / "good.jsonl", [{"text": "fine"}])
    (tmp_path / "sub").mkdir()
    refused(tmp_path, "data.files", "no file", "missing.txt", files=[str(tmp_path / "missing.txt")])
    refused(tmp_path, "data.files", "pattern", "*.nothing", files=[str(tmp_path / "*.nothing")])
    refused(tmp_path, "data.files", "pattern", "su*", files=[str(tmp_path / "su*")])
    refused(tmp_path, "data.files", "sub is a directory", "sub/*.txt", files=[str(tmp_path / "sub")])
    refused(tmp_path, "no document with text in", "empty.txt", files=[str(tmp_path / "empty.txt")])
    refused(tmp_path, "data.val_files", "no file", files=[str(good)], val_files=[str(tmp_path / "missing.txt")])
    refused(tmp_path, "good.jsonl is in both", files=[str(tmp_path / "*.jsonl")], val_files=[str(good)])
    refused(tmp_path, "needs data.files", files=[])


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        (b'{"text": "cut he', ["not JSON"]),
        (b'{"text": "caf\xe9"}', ["not JSON in UTF-8", "0xe9"]),
        (b'{"content": "a", "url": "u"}', ["no field 'text'", "'content', 'url'", "data.text_field"]),
        (b"{}", ["no field 'text'", "none"]),
        (b'{"text": 5}', ["'text' holds int"]),
        (b'{"text": ["a"]}', ["'text' holds list"]),
        (b'["a"]', ["a JSON list, not an object"]),
        (b'{"text": "\\ud800"}', ["surrogate"]),
        (b"[" * 100_000, ["not JSON"]),
    ],
)
def test_one_bad_line_is_found(tmp_path: Path, line: bytes, parts: list[str]) -> None:
    good = write_json(tmp_path / "good.jsonl", [{"text": f"document {i}"} for i in range(2000)])
    (tmp_path / "bad.jsonl").write_bytes(good.read_bytes() + line)
    refused(tmp_path, "bad.jsonl, line 2001", *parts, files=[str(good), str(tmp_path / "bad.jsonl")])
    refused(tmp_path, "bad.jsonl, line 2001", *parts, files=[str(good)], val_files=[str(tmp_path / "bad.jsonl")])


def test_json_lines_cut_off_anywhere_inside_a_line(tmp_path: Path) -> None:
    line = json.dumps({"text": "some text", "url": "u"}).encode()
    path = tmp_path / "cut.jsonl"
    for cut in range(1, len(line)):
        path.write_bytes(line + b"\n" + line[:cut])
        refused(tmp_path, "cut.jsonl, line 2", files=[str(path)])


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("kind", [".jsonl", ".txt"])
def test_cut_off_compressed_files(tmp_path: Path, suffix: str, kind: str) -> None:
    lines = [json.dumps({"text": random.Random(i).randbytes(50).hex()}) for i in range(3000)]
    plain = "\n".join(lines).encode()
    path = tmp_path / f"cut{kind}{suffix}"
    if suffix == ".zst":
        with pa.CompressedOutputStream(str(path), "zstd") as stream:
            stream.write(plain)
        whole = path.read_bytes()
    else:
        whole = COMPRESS[suffix](plain)
    for length in (len(whole) // 3, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        refused(tmp_path, path.name, "cut off", "fetch it again", files=[str(path)])
    path.write_bytes(b"plain text, no archive")
    refused(tmp_path, path.name, "cannot be read", files=[str(path)])


@pytest.mark.parametrize(("place", "bits"), [(0.5, 1), (10, 6)])  # the text, the first block's type
def test_flipped_bits_of_a_gz(tmp_path: Path, place: float, bits: int) -> None:
    whole = bytearray(gzip.compress(random.Random(0).randbytes(4000).hex().encode(), mtime=0))
    whole[int(place if place > 1 else place * len(whole))] ^= bits
    (tmp_path / "a.txt.gz").write_bytes(whole)
    refused(tmp_path, "a.txt.gz", "cannot be read", files=[str(tmp_path / "a.txt.gz")])


def test_files_without_text_not_utf8_or_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "blank.txt").write_text(" \n\n")
    refused(tmp_path, "blank.txt", "no document with text", files=[str(tmp_path / "blank.txt")])
    write_json(tmp_path / "blank.jsonl", [{"text": ""}, {"text": " "}])
    refused(tmp_path, "blank.jsonl", "no document with text", files=[str(tmp_path / "blank.jsonl")])
    (tmp_path / "latin.txt").write_bytes(b"fine\ncaf\xe9\n")
    refused(tmp_path, "latin.txt: line 2 is not UTF-8", files=[str(tmp_path / "latin.txt")])
    (tmp_path / "secret.txt").write_text("text")

    def forbidden(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files_module, "_open", forbidden)  # the tests may run as root, whom no mode stops
    refused(tmp_path, "secret.txt cannot be read", "Permission denied", files=[str(tmp_path / "secret.txt")])
