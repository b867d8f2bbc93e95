"""tools/gradient_volume.py: predicted, recorded and on the wire agree, on virtual hosts and on one."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.dist.launch import REPOSITORY, clean_environment, free_port, run_scripts
from tests.system import slow_link
from tests.system.cluster import Cluster
from tests.system.hosts import Hosts, missing_parts

TOOL = "tools/gradient_volume.py"
MODEL = """
model: {vocab_size: 2000, hidden_size: 192, intermediate_size: 500, num_layers: 3, num_heads: 4}
train: {seq_len: 32, micro_batch_size: 2, global_batch_size: 8, steps: 100, device: cpu, threads: 1}
"""
ALWAYS = "interval0: 24, ratio: 100000.0"  # one vector a side, layer and step
METHODS = {
    "full": "method: {name: full}",
    "switchlora": "method: {name: switchlora, switch: {interval0: 12}, rank: 24}",
    "local_heads": "method: {name: lte, rank: 24, lte: {local_heads: 2, merge_interval: 2}}",
    "heads": "{method: {name: lte, rank: 24, lte: {merge_interval: 2}}, parallel: {lte_heads: 2}}",
    "heads_2x2": "{method: {name: lte, rank: 24, lte: {local_heads: 2, merge_interval: 2}}, parallel: {lte_heads: 2}}",
    "reset": "{method: {name: lte, rank: 24, lte: {local_heads: 2, merge_interval: 2, merge_form: reset}}}",
    "tp_full": "{method: {name: full}, parallel: {tp: 2}}",
    "tp_switchlora": f"{{method: {{name: switchlora, rank: 24, switch: {{{ALWAYS}}}}}, parallel: {{tp: 2}}}}",
    "tp_spread": f"{{method: {{name: switchlora, rank: 24, switch: {{{ALWAYS}, bank_spread: dp}}, "
    "base_spread: dp}, "
    "parallel: {tp: 2}, "
    "train: {activation_checkpointing: true}}",
    "tp_lte": "{method: {name: lte, rank: 24, lte: {merge_interval: 2}}, parallel: {lte_heads: 2, tp: 2}}",
    "tp_frozen": "{method: {name: lora, rank: 24}, optim: {dense_lr: 0}, parallel: {tp: 2}}",
    "bf16": "{method: {name: switchlora, rank: 24}, train: {precision: bf16}}",
}


def tool_words(folder: Path, methods: list[str], stages: list[str], accumulation: list[int]) -> list[str]:
    (folder / "model.yaml").write_text(MODEL)
    words = [TOOL, "--measure", "--config", str(folder / "model.yaml")]
    for name in methods:
        (folder / f"{name}.yaml").write_text(METHODS[name] + "\n")
        words += ["--method", str(folder / f"{name}.yaml")]
    for stage in stages:
        words += ["--ds_config", f"ds_configs/zero{stage}.json"]
    return [*words, "--accumulation", *map(str, accumulation), "--out", str(folder / "volume.json")]


def kinds(result: dict[str, Any], what: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for flow in result[what]:
        found[flow["kind"]] = found.get(flow["kind"], 0.0) + flow["bytes"]
    return found


def check_record(result: dict[str, Any]) -> None:
    """Prediction and record of one case are equal, but for scalars and ZeRO's padding, which have kinds of their own;
    DeepSpeed's log says the same of what it sees."""
    predicted, recorded = kinds(result, "predicted"), kinds(result, "recorded")
    assert recorded.pop("control") < 1000, result
    padding = result["parts"].pop("padding", 0)
    assert padding <= 16 * result["micro_batches"]
    gradients = {flow["part"]: flow["bytes"] for flow in result["predicted"] if flow["kind"] == "gradients"}
    assert result["parts"] == gradients
    assert recorded.keys() == predicted.keys()
    for kind, count in predicted.items():
        assert recorded[kind] == pytest.approx(count, rel=1e-4), (kind, result)
    log = result["deepspeed_log"]
    if result["mesh"]["dp"] > 1:  # of groups of one rank it counts calls that move nothing
        assert log["all_reduce"] == pytest.approx(predicted["gradients"], rel=1e-3)
        assert log.get("all_gather_into_tensor", 0) == pytest.approx(predicted.get("parameters", 0), rel=1e-3)


@pytest.mark.full
@pytest.mark.timeout(300)
@pytest.mark.skipif(missing_parts() is not None, reason=str(missing_parts()))
@pytest.mark.parametrize(
    ("count", "lossy", "methods", "stages", "accumulation"),
    [
        (2, False, ["full", "switchlora", "local_heads", "heads"], ["0", "1", "2"], [2]),
        (4, False, ["full", "heads_2x2"], ["1", "2"], [1]),
        (2, True, ["full"], ["0"], [1]),
    ],
)
def test_on_the_wire(
    tmp_path: Path, count: int, lossy: bool, methods: list[str], stages: list[str], accumulation: list[int]
) -> None:
    """The new payload that the first host's interface has sent is what rings send of the prediction, within 1 %; what
    it has sent beside that is headers and, where packets are lost, the same again."""
    with Hosts(tmp_path, count) as hosts:
        cluster = Cluster(hosts)
        if lossy:
            hosts.lose_packets("n2")
        words = [*tool_words(tmp_path, methods, stages, accumulation), "--interface", "eth0"]
        port = str(free_port())
        started = [
            cluster.start_rank(host, rank, count, words, MASTER_PORT=port, GLOO_SOCKET_IFNAME="eth0")
            for rank, host in enumerate(hosts.names)
        ]
        for process in started:
            cluster.finish(process, timeout=240)
    results = json.loads((tmp_path / "volume.json").read_text())
    assert len(results) == len(methods) * len(stages) * len(accumulation)
    for result in results:
        check_record(result)
        assert result["wire_of_recorded"] == pytest.approx(result["wire_predicted"], rel=1e-3), result
        payload, headers, repeated = (
            result[name] / result["wire_predicted"] for name in ("wire_payload", "wire_headers", "wire_repeated")
        )
        print(
            f"{result['name']} ZeRO {result['zero']}: {payload - 1:+.3%}, headers {headers:.3%}, again {repeated:.3%}"
        )
        assert (0.99 if lossy else 1) < payload < 1.01, result  # segments sent again are counted as full ones
        assert result["wire"] == pytest.approx(
            sum(result[f"wire_{name}"] for name in ("payload", "headers", "repeated"))
        )
        assert 0 < headers < 0.05, result
        assert not lossy or repeated > 0.01, result


@pytest.mark.full
@pytest.mark.timeout(300)
def test_tensor_parallel_bank_and_merges(tmp_path: Path) -> None:
    """DeepSpeed's fp32 gradients are a class of bf16 alone: in fp32 stage 1 is the same without."""
    methods = ["tp_full", "tp_switchlora", "tp_spread", "tp_lte", "heads_2x2", "reset", "tp_frozen", "bf16"]
    for chosen, stage in ((methods, "1"), (["bf16"], "1_fp32_accum")):
        script, *words = tool_words(tmp_path, chosen, [stage], [2])
        world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "4"}
        env = clean_environment(tmp_path) | world | {"LOCAL_WORLD_SIZE": "4"}
        envs = [{**env, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(4)]
        statuses, output = run_scripts(REPOSITORY / script, words, envs, REPOSITORY, timeout=280)
        assert statuses == [0] * 4, output
        results = json.loads((tmp_path / "volume.json").read_text())
        assert len(results) == len(chosen)
        for result in results:
            check_record(result)
        assert (tmp_path / "volume.png").stat().st_size > 10_000
        assert f"| {chosen[-1]} |" in (tmp_path / "volume.md").read_text()


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.skipif(missing_parts("tc") is not None, reason=str(missing_parts("tc")))
def test_the_slow_links_command_in_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is sent, not how fast: full-rank and SwitchLoRA their gradients, LTE its merges. That the bytes of each
    method cross between hosts as predicted, `test_on_the_wire` shows."""
    (tmp_path / "input.txt").write_text(Path(str(argparse.__file__)).read_text())
    words = ["--data", tmp_path / "input.txt", "--steps", "12", "--target", "9", "--out", tmp_path / "link.json"]
    monkeypatch.setattr(sys, "argv", ["slow_link.py", *map(str, words)])
    slow_link.main()
    results = json.loads((tmp_path / "link.json").read_text())
    for place, steps in (("fast", 10), ("slow", 12)):
        found = results[place]
        assert {name: entry["steps"] for name, entry in found.items()} == dict.fromkeys(slow_link.METHODS, steps)
        full, low, heads = (found[name]["gradient_bytes_a_step"] for name in ("full", "switchlora", "lte"))
        assert full > 3 * low > 0 == heads
        assert found["full"]["sent_bytes_a_step"] > full > found["switchlora"]["sent_bytes_a_step"] > low
        assert 0 < found["lte"]["sent_bytes_a_step"] < low
        assert found["full"]["target_reached"]["step"] == 0
    assert (tmp_path / "link.png").stat().st_size > 10_000
