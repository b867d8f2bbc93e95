"""Runs of a batch, one after the other in one process."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from megatron_switchlora.study.comparison import worker


def act(payload: dict[str, Any]) -> list[dict[str, Any]]:
    os.environ.update(worker.ALONE, DS_ACCELERATOR="cpu")  # what deepspeed was imported for
    cache, folder = Path(payload["cache"]), Path(payload["folder"])
    return [worker.perform(words, cache, folder / name) for name, words in payload["runs"].items()]
