"""Counts on the meta device: a plugin's own tensors are among them, and they import nothing slow."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_switchlora.config.ds_config import Zero
from megatron_switchlora.config.method import METHODS
from megatron_switchlora.config.run import RunConfig
from megatron_switchlora.distributed.mesh import Mesh
from megatron_switchlora.methods import build_method
from megatron_switchlora.model.protocol import build_model
from megatron_switchlora.planning.dry_run import plan
from megatron_switchlora.planning.memory import checkpoint_bytes, memory_items
from tests.plain import VOCAB, PlainRun, make_batches, small_config
from tests.unit.test_convert import save

ROOT = Path(__file__).resolve().parents[2]
SLOW = ("sympy", "torch._dynamo", "transformers", "bitsandbytes", "galore_torch", "deepspeed", "datasets")
CASES = [
    ["switchlora_r512", "--parallel.tp=2"],
    ["switchlora_r512", "--method.switch.bank_spread=dp", "--model.rope_scaling={rope_type: linear, factor: 2.0}"],
    ["lora_r512", "--method.init=lora_ga", "--method.rslora=true"],
    ["lte_r64", "--method.lte.local_heads=2", "--method.lte.merge_form=reset"],
    ["lte_r64", "--method.lte.base=nf4", "--method.lte.local_heads=2"],
    ["full", "--parallel.tp=8"],
    ["lora_r512", "--method.name=mhlora", "--method.mhlora.heads=2", "--method.rank=64"],
]


@pytest.fixture
def toy_method() -> Iterator[None]:
    """Register the toy method for one test: others ask the table for the methods of the package."""
    METHODS["toy"] = importlib.import_module("tests.toy_method").ToyFacts
    yield
    del METHODS["toy"]


def kinds(config: RunConfig, tp: int = 1) -> dict[str, int]:
    return {item.kind: item.bytes for item in memory_items(config, VOCAB, tp, 1, Zero(0))}


@pytest.mark.usefixtures("toy_method")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_plugins_own_tensor_is_planned(precision: str) -> None:
    """The toy method keeps an fp32 tensor of the shape of each B, which only its own module knows."""
    toy, lora = (small_config(name, train__precision=precision) for name in ("toy", "lora"))
    own = 4 * toy.method.rank * toy.model.num_layers * (2 * 48 + 2 * 24 + 2 * 76 + 48)
    assert kinds(toy) == {**kinds(lora), "removed": own}
    assert checkpoint_bytes(toy, VOCAB) == checkpoint_bytes(lora, VOCAB) + own
    toy.model.vocab_size = VOCAB
    assert f"    removed {own / 1e6:>48.3f}\n".split() in [line.split() for line in plan(toy, {}, 1).splitlines()]


@pytest.mark.usefixtures("toy_method")
@pytest.mark.parametrize("tp", [2, 4])
def test_it_is_that_of_a_tensor_parallel_rank(tp: int) -> None:
    config = small_config("toy")
    config.model.num_heads = config.model.num_kv_heads = 4
    mesh = Mesh({"lte": 1, "dp": 1, "tp": tp}, {"lte": 0, "dp": 0, "tp": 0}, {})
    method: Any = build_method(config, build_model(config.model, VOCAB, mesh.axis("tp")), mesh)
    method.allocate()
    assert kinds(config, tp)["removed"] == sum(tensor.nbytes for tensor in method.removed.values())


@pytest.mark.usefixtures("toy_method")
def test_it_is_found_in_a_checkpoint(tmp_path: Path) -> None:
    run = PlainRun(small_config("toy"))
    run.step(0, make_batches(run.config, 1)[0])
    archive = save(run, tmp_path / "step").archive()
    assert sum(name.endswith(".removed") for name in archive.names()) == 7 * run.config.model.num_layers
    assert sum(archive.read(name).nbytes for name in archive.names()) == checkpoint_bytes(run.config, VOCAB)


def test_plans_import_nothing_slow() -> None:
    """An operation that torch has written in Python for the meta device takes a second to import sympy."""
    script = f"""
import sys
import megatron_switchlora.methods
from megatron_switchlora.config.command_line import parse_arguments
from megatron_switchlora.planning.dry_run import plan
for overlay, *options in {CASES!r}:
    files = ["--config=launch/configs/llama_1.3b.yaml", f"--config=launch/configs/methods/{{overlay}}.yaml"]
    plan(parse_arguments([*files, *options]).config, {{}}, 8)
    loaded = [name for name in {SLOW!r} if name in sys.modules]
    assert not loaded, (overlay, options, loaded)
print("done")
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout == "done\n", done.stderr
