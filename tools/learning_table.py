#!/usr/bin/env python3
"""Full-rank, LoRA and SwitchLoRA on Tiny Shakespeare, each at swept rates, three seeds: prints the table.

Every run is `launch/pretrain.py` as one process (hidden 144, 4 layers, 4 heads, ffn 384, context 128, batch 16,
initialisation 0.04, character tokens, 90/10 split by position). For a setting (steps, rank) and a method, `optim.lr`
and `optim.dense_lr` are swept at seed 0 around a starting point: the best point's neighbours at half and double of
either rate are tried until none is better. The best point then runs at seeds 1 and 2. Results are kept in a JSON file,
so the command can be stopped and started again, and prints the table from what it has.

    python tools/learning_table.py --text input.txt --out benchmarks/learning_table.json --jobs 2
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = [(600, 24), (1200, 24), (1200, 6)]
START = {"full": (0.002, 0.02), "lora": (0.02, 0.02), "switchlora": (0.02, 0.02)}
MODEL = (
    "--model.hidden_size 144 --model.intermediate_size 384 --model.num_layers 4 --model.num_heads 4 "
    "--train.seq_len 128 --train.micro_batch_size 16 --train.global_batch_size 16 --train.warmup_steps 50 "
    "--model.initializer_range 0.04 --train.eval_interval 200 --train.device cpu --train.threads 1 "
    "--data.source files --data.tokenizer char"
)
Point = tuple[float, float]


class Table:
    """Finished runs by key, in a JSON file."""

    def __init__(self, path: Path, text: Path) -> None:
        self.path, self.text = path, text
        self.lock = threading.Lock()
        self.content: dict[str, Any] = {"runs": {}}
        if path.exists():
            self.content = json.loads(path.read_text(encoding="utf-8"))
        self.runs: dict[str, dict[str, Any]] = self.content["runs"]

    def key(self, steps: int, rank: int, method: str, point: Point, seed: int) -> str:
        rank_part = "-" if method == "full" else rank
        return f"{method} steps {steps} rank {rank_part} lr {point[0]:g} dense_lr {point[1]:g} seed {seed}"

    def run(self, steps: int, rank: int, method: str, point: Point, seed: int) -> float:
        """Validation loss at the end of one run, from the file or by running it."""
        key = self.key(steps, rank, method, point, seed)
        if key not in self.runs:
            result = launch(self.text, steps, rank, method, point, seed)
            with self.lock:
                self.runs[key] = result
                self.save()
                print(f"{key}: {result['val_loss']:.4f} ({result['seconds']:.0f} s)", flush=True)
        return float(self.runs[key]["val_loss"])

    def save(self) -> None:
        self.content["machine"] = {
            "processor": platform.processor() or platform.machine(),
            "system": platform.platform(),
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.path.with_suffix(".tmp")
        scratch.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        scratch.replace(self.path)


def launch(text: Path, steps: int, rank: int, method: str, point: Point, seed: int) -> dict[str, Any]:
    """Run the trainer in a throw-away folder; its last records."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        chosen = {
            "data.files": text, "method.name": method, "method.rank": rank, "train.steps": steps, "optim.lr": point[0],
            "optim.dense_lr": point[1], "train.seed": seed, "output_dir": folder,
        }  # fmt: skip
        options = [*MODEL.split(), *(word for key, value in chosen.items() for word in (f"--{key}", str(value)))]
        command = [sys.executable, str(ROOT / "launch" / "pretrain.py"), *options]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            if "not finite" in done.stderr:  # a rate that is too high is a result too
                return {"val_loss": float("inf"), "seconds": 0.0, "diverged": True}
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-3000:]}")
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        meta = json.loads((folder / "meta.json").read_text())
        return {
            "val_loss": meta["val_loss"],
            "best_val_loss": min(r["val_loss"] for r in records if "val_loss" in r),
            "seconds": max(r["seconds"] for r in records if "seconds" in r),
            "trainable": meta["parameters"]["trainable"],
            "full_rank": meta["parameters"]["full_rank"],
            "revision": meta["versions"]["git_revision"],
            "torch": meta["versions"]["torch"],
        }


def neighbours(point: Point) -> list[Point]:
    lr, dense = point
    return [(lr / 2, dense), (lr * 2, dense), (lr, dense / 2), (lr, dense * 2)]


def sweep(table: Table, steps: int, rank: int, method: str, start: Point, pool: ThreadPoolExecutor) -> Point:
    """The point whose neighbours at half and double of either rate are all worse, at seed 0."""
    best = start
    while True:
        points = [best, *neighbours(best)]
        losses = list(pool.map(lambda p: table.run(steps, rank, method, p, 0), points))
        winner = points[losses.index(min(losses))]
        if winner == best:
            return best
        best = winner


def print_table(table: Table, chosen: dict[tuple[int, int, str], Point]) -> None:
    print("\n| steps | method | rank | trainable | lr | dense_lr | validation loss, seeds 0, 1, 2 | mean |")
    print("|---|---|---|---|---|---|---|---|")
    for (steps, rank, method), point in chosen.items():
        runs = [table.runs[table.key(steps, rank, method, point, seed)] for seed in (0, 1, 2)]
        losses = [run["val_loss"] for run in runs]
        share = runs[0]["trainable"] / runs[0]["full_rank"]
        print(
            f"| {steps} | {method} | {'-' if method == 'full' else rank} | {share:.0%} | {point[0]:g} | {point[1]:g} | "
            f"{', '.join(f'{loss:.3f}' for loss in losses)} | {statistics.mean(losses):.3f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="Tiny Shakespeare's input.txt")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "learning_table.json")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, one thread each")
    arguments = parser.parse_args()
    table = Table(arguments.out, arguments.text)
    chosen: dict[tuple[int, int, str], Point] = {}
    start = dict(START)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for steps, rank in SETTINGS:
            for method in START:
                if method == "full" and any(key[0] == steps and key[2] == "full" for key in chosen):
                    continue  # has no rank
                start[method] = sweep(table, steps, rank, method, start[method], pool)
                chosen[steps, rank, method] = start[method]
                best = start[method]
                list(pool.map(lambda seed: table.run(steps, rank, method, best, seed), (1, 2)))  # noqa: B023
            print_table(table, chosen)


if __name__ == "__main__":
    main()
