"""What a file holds: by its name, and by its first bytes where the name says nothing.

Text is what nothing else is: sources of programs, notes, files without a suffix. A name that means a table or a
container is refused, since the commas, headers and padding would be trained on; so is content that is one under a name
of text. Markup is text, and a corpus of sources may want it: it is read, and told.
"""

from __future__ import annotations

import io
import json
from itertools import islice
from pathlib import Path

Source = Path | str  # a file here, or the address of one on the hub

MARK = b"\xef\xbb\xbf"  # what some programs put before UTF-8: no part of the text
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
JSON_LINES = (".jsonl", ".json", ".ndjson", ".jsonlines", ".jl")
JULIA = ".jl"  # whose sources have the name of JSON lines
MARKUP_NAMES = (".html", ".htm", ".xhtml", ".xml")
NOT_TEXT = {
    "a table": ".csv .tsv .psv .xls .xlsx .ods .arrow .feather .avro .orc .h5 .hdf5 .sqlite .sqlite3 .dta .parq .pq",
    "an archive": ".tar .tgz .tbz .tbz2 .txz .tzst .zip .7z .rar .jar .whl .warc",
    "a compressed file of a kind that is not read here": ".lz4 .lzma .lz .z .snappy .zstd",
    "a document of another program": ".pdf .doc .docx .odt .rtf .epub .ppt .pptx .djvu",
    "arrays or objects of a program": ".npy .npz .pkl .pickle .bin .idx .safetensors .gguf .onnx .tfrecord .ckpt .pth",
}
MAGIC = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "Zstandard",
    b"\xfd7zXZ\0": "xz",
    b"PK\x03\x04": "a zip archive",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!\x1a\x07": "a RAR archive",
    b"PAR1": "Parquet",
    b"%PDF-": "PDF",
    b"SQLite format 3\0": "an SQLite database",
    b"ARROW1\0\0": "Arrow",
    b"Obj\x01": "Avro",
    b"\x93NUMPY": "a numpy array",
    b"\x89HDF\r\n": "HDF5",
    b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": "an old Office document",
}
WIDE = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


def form_of(source: Source) -> tuple[str, str]:
    """What a file holds by its name, "json", "parquet" or "text", and the suffix of its compression or ""."""
    name, compression = _plain_name(source)
    if name.endswith(JSON_LINES):
        return "json", compression
    return "parquet" if name.endswith(".parquet") else "text", compression


def not_text_by_name(source: Source) -> str | None:
    """What a file of no known form is, if its name says that it is not text."""
    suffix = Path(_plain_name(source)[0]).suffix
    return next((what for what, suffixes in NOT_TEXT.items() if suffix in suffixes.split()), None)


def markup_by_name(source: Source) -> bool:
    return _plain_name(source)[0].endswith(MARKUP_NAMES)


def may_be_julia(source: Source) -> bool:
    return _plain_name(source)[0].endswith(JULIA)


def _plain_name(source: Source) -> tuple[str, str]:
    name = str(source).lower()
    compression = next((suffix for suffix in COMPRESSED if name.endswith(suffix)), "")
    return name.removesuffix(compression), compression


def not_text_by_content(content: bytes) -> str | None:
    """What some bytes from the start of a file are, if they are known not to be UTF-8 text."""
    wide = next((name for mark, name in WIDE.items() if content.startswith(mark)), None)
    if wide:
        return f"text in {wide} by its byte order mark"
    kind = next((what for magic, what in MAGIC.items() if content.startswith(magic)), None)
    if content[257:262] == b"ustar":
        kind = "a tar archive"
    elif content[:3] == b"BZh" and content[4:10] == b"1AY&SY":
        kind = "bzip2"
    return kind and f"{kind} by its content"


def lines_are_objects(content: bytes) -> bool:
    """Whether the first lines of a text that are not blank, three at most, are JSON objects each."""
    if not starts_with_object(content):
        return False
    filled = (line for line in io.BytesIO(content) if line.strip())
    return all(map(_is_object, islice(filled, 3)))


def starts_with_object(content: bytes) -> bool:
    """Whether JSON lines could begin so."""
    return content[:1000].removeprefix(MARK).lstrip().startswith(b"{")


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False
