"""Recognise a file's format by its name, or by its first bytes where the name says nothing.

Any file of no known format is text: program sources, notes, files without a suffix. A name that means a table or a
container is an error, since training would learn commas, headers and padding. The same content under a name of text is
an error too. Markup is read as text, since a corpus of sources may want it, and is reported.
"""

from __future__ import annotations

import io
import json
from itertools import islice
from pathlib import Path

Source = Path | str  # a local file, or the address of one on the hub

MARK = b"\xef\xbb\xbf"  # the byte order mark that some programs put before UTF-8; not part of the text
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
JSON_LINES = (".jsonl", ".json", ".ndjson", ".jsonlines", ".jl")
JULIA = ".jl"  # a suffix that Julia sources share with JSON lines
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
    """Return a file's format by its name, "json", "parquet" or "text", and its compression suffix or ""."""
    name, compression = _plain_name(source)
    if name.endswith(JSON_LINES):
        return "json", compression
    return "parquet" if name.endswith(".parquet") else "text", compression


def not_text_by_name(source: Source) -> str | None:
    """Describe a file of no known format whose name says that it is not text, else return None."""
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
    """Describe the first bytes of a file that are known not to be UTF-8 text, else return None."""
    wide = next((name for mark, name in WIDE.items() if content.startswith(mark)), None)
    if wide:
        return f"text in {wide} by its byte order mark"
    file_type = next((what for magic, what in MAGIC.items() if content.startswith(magic)), None)
    if content[257:262] == b"ustar":
        file_type = "a tar archive"
    elif content[:3] == b"BZh" and content[4:10] == b"1AY&SY":
        file_type = "bzip2"
    return file_type and f"{file_type} by its content"


def lines_are_objects(content: bytes) -> bool:
    """Return whether each of the first non-blank lines of a text, at most three, is a JSON object."""
    if not starts_with_object(content):
        return False
    filled = (line for line in io.BytesIO(content) if line.strip())
    return all(map(_is_object, islice(filled, 3)))


def starts_with_object(content: bytes) -> bool:
    """Return whether the content starts with "{", as JSON lines do."""
    return content[:1000].removeprefix(MARK).lstrip().startswith(b"{")


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False
