"""Running commands on virtual hosts, with a corpus and private caches."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import Any

from megatron_switchlora.run.metrics_log import read_records
from tests.dist.launch import REPOSITORY, clean_environment, free_port
from tests.system.commands import BIN, SMALL, write_corpus
from tests.system.hosts import Hosts


class Cluster:
    """Commands on hosts that reach each other by ssh, with a corpus."""

    def __init__(self, hosts: Hosts) -> None:
        self.hosts, self.folder = hosts, hosts.folder
        self.corpus = write_corpus(self.folder / "corpus")
        path = f"{hosts.ssh()}:{BIN}:{os.environ['PATH']}"
        self.env = {**clean_environment(self.folder), "XDG_CACHE_HOME": str(self.folder / "cache"), "PATH": path,
                    "PYTHON": sys.executable, "PDSH_RCMD_TYPE": "ssh"}  # fmt: skip

    def options(self, run: str, *more: str) -> list[str]:
        return [*SMALL, "--data.files", f"{self.corpus}/*.txt", "--output_dir", str(self.folder / run), *more]

    def start(self, host: str, words: list[str], **env: str) -> subprocess.Popen:
        return self.hosts.start(
            host, words, env=self.env | env, cwd=REPOSITORY, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def rank(self, host: str, rank: int, run: str, *more: str, **env: str) -> subprocess.Popen:
        """One of two ranks of a run, started by hand."""
        return self.start_rank(host, rank, 2, ["launch/pretrain.py", *self.options(run, *more)], **env)

    def start_rank(self, host: str, rank: int, world: int, words: list[str], **env: str) -> subprocess.Popen:
        """A Python program as a rank of a world, of which each host has one."""
        place = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": "1"}
        place |= {"MASTER_ADDR": "n1", "MASTER_PORT": str(free_port())}
        return self.start(host, [sys.executable, *words], **{**place, **env})

    def finish(self, process: subprocess.Popen, timeout: float = 120) -> str:
        output, _ = process.communicate(timeout=timeout)
        assert process.returncode == 0, output
        return output

    def records(self, run: str) -> list[dict[str, Any]]:
        return read_records(self.folder / run / "metrics.jsonl")

    def pids(self) -> list[int]:
        return self.hosts.pids("^[^ ]*python.*[ /]launch/pretrain.py")

    def wait_until_gone(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self.pids():
            assert time.monotonic() < deadline, self.hosts.run("n1", ["ps", "axf"])
            time.sleep(0.1)
