#!/usr/bin/env python3
"""Train full-rank, SwitchLoRA and LTE across two virtual hosts, with and without a slow link between them.

    python -m tests.system.slow_link --data input.txt --link 100mbit --out benchmarks/slow_link.json

Needs root (network namespaces) and an idle machine of two cores, one for each host. The setting is Tiny Shakespeare by
characters as in tools/settings/tiny_shakespeare.yaml, at the rates its sweep has chosen, on two data-parallel ranks at
ZeRO 0 (LTE: two heads). Over the slow link whole runs are made, for the time to a given loss; without it a tenth of
each, for the speed. Times are of training steps; evaluations are not counted.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import median
from typing import Any, Optional

import yaml

from megatron_switchlora.disk import replace_text, user_path
from megatron_switchlora.run.figures import new_figure, save_figure
from megatron_switchlora.run.machine import machine, versions
from tests.dist.launch import REPOSITORY, free_port
from tests.system.cluster import Cluster
from tests.system.hosts import Hosts, missing_parts

METHODS = {
    "full": {"method.name": "full"},
    "switchlora": {"method.name": "switchlora"},
    "lte": {"method.name": "lte", "parallel.lte_heads": 2, "method.lte.merge_interval": 10, "method.alpha": 1536},
}


def options(method: str, rates: tuple[float, float], steps: int, data: Path) -> list[str]:
    setting = yaml.safe_load((REPOSITORY / "tools" / "settings" / "tiny_shakespeare.yaml").read_text())
    chosen = {key: value for key, value in setting["options"].items() if key != "data.files"}
    chosen |= {"train.micro_batch_size": 8, "train.eval_interval": 25, "data.files": str(data)}
    chosen |= {"optim.lr": rates[0], "optim.dense_lr": rates[1], "train.stop_after_steps": steps}
    chosen |= METHODS[method]
    return [word for key, value in chosen.items() for word in (f"--{key}", str(value))]


def train(method: str, rates: tuple[float, float], steps: int, link: Optional[str], data: Path) -> list[dict[str, Any]]:
    """Records of a run, of which each host has a rank."""
    with tempfile.TemporaryDirectory() as folder, Hosts(Path(folder)) as hosts:
        cluster = Cluster(hosts)
        for host in hosts.names if link else []:
            shape = ["root", "tbf", "rate", str(link), "burst", "256kb", "latency", "200ms"]
            hosts.run(host, ["tc", "qdisc", "add", "dev", "eth0", *shape])
        words = ["launch/pretrain.py", "--ds_config", "ds_configs/zero0.json", "--output_dir", f"{folder}/run"]
        words += options(method, rates, steps, data)
        port, before = str(free_port()), hosts.sent_bytes("n2")
        started = [
            cluster.start_rank(host, rank, 2, words, MASTER_PORT=port, GLOO_SOCKET_IFNAME="eth0")
            for rank, host in enumerate(hosts.names)
        ]
        for process in started:
            output, _ = process.communicate(timeout=3600)
            if process.returncode not in (0, 75):
                raise RuntimeError(output)
        records = cluster.records("run")
        return [*records, {"sent": hosts.sent_bytes("n2") - before}]


def summary(records: list[dict[str, Any]], target: float) -> dict[str, Any]:
    """Speed, bytes, the curve (step, seconds of training, validation loss) and when it first is at the target."""
    steps = [record for record in records if "loss" in record]
    seconds = [0.0, *accumulate(
        (now["tokens"] - before["tokens"]) / now["tokens_per_second"]
        for before, now in zip([{"tokens": 0}, *steps], steps, strict=False)
    )]  # fmt: skip
    curve = [(r["step"], seconds[r["step"]], r["val_loss"]) for r in records if "val_loss" in r]
    reached = next(((step, when) for step, when, loss in curve if loss <= target), None)
    return {
        "steps": len(steps),
        "tokens_per_second": steps[-1]["tokens"] / seconds[-1],  # with merges and slow steps
        "median_step_seconds": median(
            (now["tokens"] - before["tokens"]) / now["tokens_per_second"] for before, now in pairwise(steps[5:])
        ),
        "mean_step_seconds": seconds[-1] / len(steps),
        "sent_bytes_a_step": records[-1]["sent"] / len(steps),
        "gradient_bytes_a_step": steps[-1]["dp_bytes"],
        "target_reached": reached and {"step": reached[0], "seconds": reached[1]},
        "curve": curve,
    }


def plot(results: dict[str, Any], path: Path) -> None:
    figure = new_figure(9, 4.5)
    axes = figure.subplots()
    for name, found in results["slow"].items():
        axes.plot([point[1] for point in found["curve"]], [point[2] for point in found["curve"]], label=name)
    axes.axhline(results["target"], color="grey", linewidth=0.8)
    axes.set(xlabel="seconds of training", ylabel="validation loss (nats a character)",
             title=f"Tiny Shakespeare on two hosts, {results['link']}/s between them", ylim=(None, 2.8))  # fmt: skip
    axes.grid(alpha=0.3)
    save_figure(figure, path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=user_path, required=True, help="Tiny Shakespeare's input.txt")
    parser.add_argument("--link", default="100mbit", help="as tc writes rates (default: 100mbit)")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--target", type=float, default=1.8, help="validation loss (default: 1.8)")
    parser.add_argument("--rates", type=user_path, default=REPOSITORY / "benchmarks" / "compare_tiny_shakespeare.json")
    parser.add_argument("--out", type=user_path, default=REPOSITORY / "benchmarks" / "slow_link.json")
    arguments = parser.parse_args()
    if arguments.steps < 10:
        parser.error("--steps must be at least 10")
    missing = missing_parts("tc")
    if missing:
        parser.error(missing)
    chosen = json.loads(arguments.rates.read_text())["chosen"]
    results: dict[str, Any] = {"link": arguments.link, "target": arguments.target, "steps": arguments.steps,
                               "rates": {name: chosen[name] for name in METHODS}, "fast": {}, "slow": {},
                               "machine": machine() | versions()}  # fmt: skip
    data = arguments.data.absolute()
    for name in METHODS:
        places = (("fast", None, max(10, arguments.steps // 10)), ("slow", arguments.link, arguments.steps))
        for place, link, steps in places:
            found = summary(train(name, chosen[name], steps, link, data), arguments.target)
            results[place][name] = found
            print(f"{name}, {link or 'no limit'}: {found['tokens_per_second']:,.0f} tokens/s, "
                  f"{found['sent_bytes_a_step'] / 1e6:.3f} MB a step, target {found['target_reached']}")  # fmt: skip
            replace_text(arguments.out, json.dumps(results, indent=1) + "\n")
    plot(results, arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
