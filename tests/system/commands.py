"""Run the user's command lines in a throw-away folder and look at what is left."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

from tests.dist.launch import REPOSITORY, clean_environment, end, free_port, run_scripts

BIN = Path(sys.executable).parent
EVALUATED = 64  # validation samples: half of a short run's seconds, were it all of them
SMALL = (
    "--model.hidden_size 32 --model.intermediate_size 48 --model.num_layers 2 --model.num_heads 2 --method.rank 6 "
    "--method.switch.interval0 4 --method.switch.freeze_steps 2 --train.steps 12 --train.warmup_steps 3 "
    "--train.seq_len 32 --train.micro_batch_size 2 --train.global_batch_size 8 --train.eval_interval 6 "
    f"--train.eval_samples {EVALUATED} "
    "--train.threads 1 --optim.lr 0.01 --train.device cpu --data.source files --data.vocab_size 300"
).split()


def write_corpus(folder: Path) -> Path:
    """Two of Python's own sources as text files."""
    folder.mkdir(exist_ok=True)
    for module in (argparse, textwrap):
        source = Path(str(module.__file__))
        (folder / f"{source.stem}.txt").write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    return folder


class Place:
    """A scratch folder with a corpus, a private cache and a run folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.corpus = write_corpus(folder / "corpus")
        self.env = {**clean_environment(folder), "XDG_CACHE_HOME": str(folder / "cache"), "PYTHONUNBUFFERED": "1"}
        self.env["PATH"] = f"{BIN}:{self.env['PATH']}"

    def options(self, run: str, *more: str) -> list[str]:
        return [*SMALL, "--data.files", f"{self.corpus}/*.txt", "--output_dir", str(self.folder / run), *more]

    def command(self, launcher: str, arguments: list[str]) -> list[str]:
        """The line a user would type under a launcher: deepspeed, torchrun, mpirun or alone."""
        script = str(REPOSITORY / "launch" / "pretrain.py")
        port = str(free_port())
        lines = {
            "deepspeed": [str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", port, script],
            "torchrun": [str(BIN / "torchrun"), "--nproc_per_node", "2", "--master_port", port, script],
            "mpirun": [str(BIN / "mpirun"), "-n", "2", sys.executable, script],
            "torchrun 4": [str(BIN / "torchrun"), "--nproc_per_node", "4", "--master_port", port, script],
            "alone": [sys.executable, script],
            "python": [sys.executable, script],
        }
        return lines[launcher] + arguments

    def start(self, launcher: str, arguments: list[str]) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(launcher, arguments), env=self.env, cwd=self.folder, text=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def run(self, launcher: str, arguments: list[str], timeout: float = 120) -> tuple[int, str]:
        """Exit status and output; everything started is gone afterwards. Where the start is not the matter, "alone" and
        "2 ranks" are quickest: forked without the seconds of their imports. "python" starts one process as users do."""
        if launcher == "alone":
            return self.script("launch/pretrain.py", *arguments, timeout=timeout)
        if launcher.endswith(" ranks"):
            statuses, output = self.run_ranks(int(launcher.split()[0]), arguments, timeout)
            assert len(set(statuses)) == 1, (statuses, output)
            return statuses[0], output
        process = self.start(launcher, arguments)
        try:
            output, _ = process.communicate(timeout=timeout)
        finally:
            end([process])
        return process.returncode, output

    def run_pair(self, arguments: list[str], timeout: float = 60) -> tuple[list[int], str]:
        """Two ranks without a launcher that would repeat their words: statuses and both outputs."""
        return self.run_ranks(2, arguments, timeout)

    def run_ranks(self, count: int, arguments: list[str], timeout: float) -> tuple[list[int], str]:
        size = str(count)
        world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": size}
        ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
        return self.run_each(arguments, [{**world, "LOCAL_WORLD_SIZE": size, **rank} for rank in ranks], timeout)

    def run_each(self, arguments: list[str], added: list[dict[str, str]], timeout: float) -> tuple[list[int], str]:
        """One process by hand for each environment that is added to the clean one: statuses and all outputs."""
        envs = [{**self.env, **variables} for variables in added]
        return run_scripts(REPOSITORY / "launch" / "pretrain.py", arguments, envs, self.folder, timeout)

    def typed(self, name: str, *words: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """`python name words` as users start it."""
        command = [sys.executable, str(REPOSITORY / name), *words]
        return subprocess.run(command, env=self.env, cwd=self.folder, capture_output=True, text=True, timeout=timeout)

    def script(self, name: str, *words: str, timeout: float = 120) -> tuple[int, str]:
        """The same, forked from a warm interpreter: exit status and output."""
        (status,), output = run_scripts(REPOSITORY / name, list(words), [self.env], self.folder, timeout)
        return status, output

    def records(self, run: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / run / "metrics.jsonl").read_text().splitlines()]
