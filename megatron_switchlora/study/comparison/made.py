"""What a batch has made in its work folder, so that a later call removes that and nothing else.

`.batch` in the folder lists the names, one per line, each written before there is a file or folder of that name.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from megatron_switchlora.config.errors import require
from megatron_switchlora.disk import open_no_follow, remove

LIST = ".batch"
NAMES = re.compile(r"worker\d+\.log|[\w.+-]+_seed_\d+_[0-9a-f]{8}")  # all that a batch ever makes


class Made:
    """The names of a work folder that are a batch's; the caller holds the folder's lock."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        lines = []
        if (folder / LIST).is_file():
            lines = (folder / LIST).read_text(encoding="utf-8", errors="replace").splitlines()
        self._names = {line for line in lines if NAMES.fullmatch(line)}

    def remove_all(self) -> None:
        """Remove what earlier calls have made: no run of a batch is resumed."""
        for name in sorted(self._names):
            remove(self.folder / name)
        remove(self.folder / LIST)
        self._names.clear()

    def claim(self, name: str) -> Path:
        """Return the path of a file or folder that is about to be made.

        Raises:
            UserError: there is one that no batch has made.
        """
        path = self.folder / name
        if name not in self._names:
            require(
                not os.path.lexists(path),
                f"{path} is there, and was not made by this batch: move it away, or give another --work.",
            )
            with open_no_follow(self.folder / LIST, os.O_WRONLY | os.O_APPEND | os.O_CREAT) as file:
                file.write(f"{name}\n".encode())
            self._names.add(name)
        return path
