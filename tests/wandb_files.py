"""Read what Weights & Biases writes in offline mode: a log of blocks as LevelDB's, with protocol buffers inside."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK = 32768
WHOLE, LAST = 1, 4  # kinds of pieces that end a record


def messages(data: bytes) -> Iterator[bytes]:
    """Yield the records of a .wandb file."""
    assert data[:4] == b":W&B"
    at, message = 7, b""
    while at + 7 <= len(data):
        if BLOCK - at % BLOCK < 7:  # no room for a header: padding
            at += BLOCK - at % BLOCK
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        message += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (WHOLE, LAST):
            yield message
            message = b""


def read_run(path: Path) -> dict[str, Any]:
    """Return id, project, group, name, config, exit code and the rows of one start's file."""
    from wandb.proto import wandb_internal_pb2

    found: dict[str, Any] = {"rows": [], "exit": None}
    for message in messages(path.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(message)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run = record.run
            found |= {"id": run.run_id, "project": run.project, "group": run.run_group, "name": run.display_name}
            found["config"] = {item.key: json.loads(item.value_json) for item in run.config.update}
        elif kind == "history":
            items = record.history.item
            found["rows"].append({item.key or item.nested_key[0]: json.loads(item.value_json) for item in items})
        elif kind == "exit":
            found["exit"] = record.exit.exit_code
    return found
