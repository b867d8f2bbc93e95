"""Check that the package is right on a GPU, then how fast it is: stages, each a process with a time limit.

    machine    versions; whether fp32 products are fp32; rates of a large product and a copy
    tests      the comparisons of tests/gpu, where that folder is and a GPU
    reference  every method in float64 without DeepSpeed, on the device against the CPU
    engines    DeepSpeed's optimizer classes, on the device against the CPU
    products, parts, speed, peers
               the 1.3B model's products and parts, steps by part with their memory against the plan, and steps of
               other libraries: see gpu_speed.py
A stage that fails, hangs or runs out of memory stops no other. Processes are forked from one that has not touched the
device. The result is a dictionary for a JSON file; `verdict` lists what is wrong.

    switchlora check-gpu --out check_gpu.json
    switchlora check-gpu --device cpu --tiny --out check_cpu.json    # tries the script itself
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from megatron_switchlora.config.ds_config import resolve_ds_config
from megatron_switchlora.config.errors import ends_on_mistake, require
from megatron_switchlora.config.method import MethodConfig, make_method
from megatron_switchlora.config.model import ModelConfig
from megatron_switchlora.config.optim import OptimConfig
from megatron_switchlora.config.run import RunConfig
from megatron_switchlora.config.train import TrainConfig
from megatron_switchlora.disk import user_path
from megatron_switchlora.distributed.mesh import build_mesh
from megatron_switchlora.methods import build_method
from megatron_switchlora.model.protocol import build_model, initialize_weights
from megatron_switchlora.optim.layout import plain_layout
from megatron_switchlora.run.machine import versions
from megatron_switchlora.shipped import ROOT
from megatron_switchlora.startup.device import choose_device
from megatron_switchlora.startup.environment import Ranks, complete_environment
from megatron_switchlora.study import gpu_speed

VOCAB = 61
METHODS = {  # with the largest relative difference of a loss between float64 on two devices
    "full": 1e-9, "lora": 1e-9, "relora": 1e-9, "switchlora": 1e-9, "mhlora": 1e-9, "lte": 1e-9,
}  # fmt: skip
CLASSES: dict[str, dict[str, Any]] = {  # DeepSpeed's optimizer classes, by the JSON that chooses them
    "zero0": {"zero_optimization": {"stage": 0}},
    "zero1": {"zero_optimization": {"stage": 1}},
    "zero2": {"zero_optimization": {"stage": 2}},
    "zero1_fp32_accum": {"zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}},
}
TOLERANCES = {"fp32": 1e-5, "bf16": 5e-3}
LIMITS = {"machine": 30.0, "tests": 70.0, "reference": 45.0, "engines on the CPU": 40.0, "engines": 45.0,
          "products": 25.0, "parts": 35.0, "speed": 110.0, "peers": 30.0, "peers compiled": 50.0}  # fmt: skip
TOTAL = 480.0


def small_config(method: MethodConfig, precision: str = "fp32") -> RunConfig:
    """Return a run that switches, merges or restarts within a few steps."""
    return RunConfig(
        model=ModelConfig(hidden_size=48, intermediate_size=76, num_layers=2, num_heads=4, num_kv_heads=2),
        method=method,
        optim=OptimConfig(lr=0.0005, dense_lr=0.0005),
        train=TrainConfig(
            steps=60, warmup_steps=2, seq_len=16, micro_batch_size=2, global_batch_size=4,
            precision=precision,  # type: ignore[arg-type]
        ),
    )  # fmt: skip


def small_method(name: str) -> MethodConfig:
    own: dict[str, dict[str, Any]] = {
        "switchlora": {"switch__interval0": 4.0, "switch__freeze_steps": 2, "switch__ratio": 1.0},
        "relora": {"relora__interval": 3, "relora__warmup": 1},
        "lte": {"lte__local_heads": 2, "lte__merge_interval": 3, "alpha": 7.0},
        "mhlora": {"mhlora__heads": 2, "alpha": 7.0},
    }
    return make_method(name, rank=7, **own.get(name, {}))


def batches(config: RunConfig, steps: int, vocab_size: int) -> list[list[Tensor]]:
    """Return random micro-batches [micro_batch_size, S + 1] for each step."""
    generator, train = torch.Generator().manual_seed(1), config.train
    shape = (steps, train.global_batch_size, train.seq_len + 1)
    return [
        list(batch.split(train.micro_batch_size)) for batch in torch.randint(vocab_size, shape, generator=generator)
    ]


def plain_losses(config: RunConfig, device: torch.device, steps: int) -> list[float]:
    """Return the loss of each step in float64, without DeepSpeed and clip."""
    model = build_model(config.model, VOCAB)
    initialize_weights(model, config.train.seed)
    method = build_method(config, model.double())
    model.to(device)
    optimizer = method.build_optimizer()
    optimizer.attach(plain_layout([param for group in optimizer.param_groups for param in group["params"]]))
    method.start(optimizer)
    losses = []
    for step, pieces in enumerate(batches(config, steps, VOCAB)):
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * method.lr_factor(step)
        optimizer.zero_grad()
        tokens = [piece.to(device) for piece in pieces]
        loss = torch.stack([model(each[:, :-1], each[:, 1:]).sum() for each in tokens]).mean()
        loss.backward()
        method.before_step(step)
        optimizer.step()
        method.after_step(step)
        losses.append(float(loss.detach()))
    return losses


def build_engine(config: RunConfig, ds_config: dict[str, Any], device: torch.device) -> Any:
    """Return a fresh engine of this process alone, whose communication has begun."""
    from megatron_switchlora.train.engine import Engine

    mesh = build_mesh(config.parallel)
    model = build_model(config.model, VOCAB, mesh.axis("tp"))
    initialize_weights(model, config.train.seed)
    resolved = resolve_ds_config(ds_config, config, 1)
    return Engine(model, build_method(config, model, mesh), config, resolved, mesh, device)


def begin(device: torch.device) -> None:
    from megatron_switchlora.train.engine import start_distributed

    complete_environment(os.environ)
    start_distributed(device, 60)


class Stages:
    """The stages, by name; `tiny` shrinks what only measures."""

    def __init__(self, device: str, tiny: bool, root: Path) -> None:
        self.kind, self.tiny, self.root = device, tiny, root

    def device(self) -> torch.device:
        return choose_device(self.kind, Ranks(0, 1, 0, 1), 0)

    def wait(self) -> None:
        if self.kind == "cuda":
            torch.cuda.synchronize()

    def seconds(self, act: Callable[[], object], repeat: int) -> float:
        """Return the median seconds of a call, the device idle before and after it."""
        spent = []
        for _ in range(repeat + 1):
            self.wait()
            began = time.perf_counter()
            act()
            self.wait()
            spent.append(time.perf_counter() - began)
        return median(spent[1:])

    def machine(self) -> dict[str, Any]:
        device, size, copied = self.device(), 128 if self.tiny else 8192, 1 << (16 if self.tiny else 30)
        a, b = (torch.randn(128, 128, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
        exact = a.double() @ b.double()
        error = float(((a.to(device) @ b.to(device)).cpu().double() - exact).norm() / exact.norm())
        x = torch.randn(size, size, device=device, dtype=torch.bfloat16)
        source = torch.empty(copied, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        cuda = self.kind == "cuda"
        return {
            "name": torch.cuda.get_device_name(device) if cuda else "cpu",
            "CUDA": torch.version.cuda,
            "NCCL": list(torch.cuda.nccl.version()) if cuda else None,
            **versions(),
            "relative error of an fp32 product": error,
            "right": error < 1e-6,
            f"TFLOP/s of a bf16 product of size {size}": 2 * size**3 / self.seconds(lambda: x @ x, 5) / 1e12,
            "TB/s of a copy": 2 * copied / self.seconds(lambda: target.copy_(source), 5) / 1e12,
        }

    def tests(self) -> dict[str, Any]:
        folder = self.root / "tests" / "gpu"
        if self.kind != "cuda" or not folder.is_dir():
            return {"left out": f"needs a GPU and {folder}"}
        command = [sys.executable, "-m", "pytest", "-q", "-s", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=self.root, check=False)
        return {"right": done.returncode == 0, "end": done.stdout[-2000:]}

    def reference(self) -> dict[str, Any]:
        device, methods = self.device(), {}
        for name, bar in METHODS.items():
            config = small_config(small_method(name))
            losses, expected = (
                plain_losses(config, each, 3 if self.tiny else 10) for each in (device, torch.device("cpu"))
            )
            methods[name] = {"difference": largest_difference(losses, expected), "bar": bar}
        return {"methods": methods, "right": all(each["difference"] < each["bar"] for each in methods.values())}

    def engines(self) -> dict[str, Any]:
        """Return losses, norms and switches of a few steps, for the caller to compare."""
        device = self.device()
        begin(device)
        cases = {}
        kinds = {kind: CLASSES[kind] for kind in ("zero1", "zero1_fp32_accum")} if self.tiny else CLASSES
        for name in ("switchlora",) if self.tiny else ("full", "switchlora"):
            for precision in TOLERANCES:
                for kind, ds_config in kinds.items():
                    if kind == "zero1_fp32_accum" and precision == "fp32":
                        continue
                    engine = build_engine(small_config(small_method(name), precision), ds_config, device)
                    steps = batches(engine.config, 2 if self.tiny else 8, VOCAB)
                    done = [engine.train_step(step, pieces) for step, pieces in enumerate(steps)]
                    cases[f"{name} {kind} {precision}"] = {
                        "losses": [each.loss for each in done],
                        "norms": [each.grad_norm for each in done],
                        "switched": [each.switched for each in done],
                        "healthy": all(each.healthy for each in done),
                    }
        return cases

    def products(self) -> dict[str, Any]:
        return gpu_speed.products(self.device(), self.tiny, self.seconds)

    def parts(self) -> dict[str, Any]:
        return gpu_speed.layer_parts(self.device(), self.tiny)

    def speed(self) -> dict[str, Any]:
        device = self.device()
        begin(device)
        return gpu_speed.speed(device, self.tiny)

    def peers(self, names: tuple[str, ...]) -> dict[str, Any]:
        device = self.device()
        begin(device)
        return gpu_speed.peers(device, self.tiny, names)


def largest_difference(values: list[float], expected: list[float]) -> float:
    """Return the largest relative difference of two lists of one length; infinite where one is not a number."""
    pairs = zip(values, expected, strict=True)
    differences = [abs(a - b) / max(abs(b), 1e-30) for a, b in pairs]
    return max(each if each == each else float("inf") for each in differences)


def compare_engines(here: dict[str, Any], cpu: dict[str, Any]) -> dict[str, Any]:
    """Return for each case the largest differences, and whether all keep within their precision's tolerance."""
    cases: dict[str, Any] = {}
    right = here.keys() == cpu.keys()
    for name in here.keys() & cpu.keys():
        values, expected, bar = here[name], cpu[name], TOLERANCES[name.split()[-1]]
        cases[name] = {
            **{key: largest_difference(values[key], expected[key]) for key in ("losses", "norms")},
            "switched alike": values["switched"] == expected["switched"] and values["healthy"] and expected["healthy"],
            "bar": bar,
        }
        right &= cases[name]["switched alike"] and cases[name]["losses"] < bar
    return {"cases": dict(sorted(cases.items())), "right": right}


def _child(act: Callable[[], dict[str, Any]], path: str) -> None:
    os.setsid()  # so that what it starts ends with it
    try:
        result = act()
    except BaseException:
        result = {"failed": traceback.format_exc()[-2000:]}
    Path(path).write_text(json.dumps(result), encoding="utf-8")
    os._exit(0)


def limited(act: Callable[[], dict[str, Any]], seconds: float) -> dict[str, Any]:
    """Return what a function returns in a process of its own, or why there is nothing."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        process = multiprocessing.get_context("fork").Process(target=_child, args=(act, str(path)))
        process.start()
        process.join(max(0.1, seconds))
        if process.is_alive() and process.pid:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.join()
            return {"failed": f"it had not ended after {seconds:.0f} s"}
        if not path.is_file():
            return {"failed": f"its process ended with status {process.exitcode}"}
        return json.loads(path.read_text(encoding="utf-8"))


def check(device: str, tiny: bool, root: Path, report: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Run all stages, on a GPU within `TOTAL` seconds; `report` is called with the result after each."""
    began = time.perf_counter()
    result: dict[str, Any] = {
        "commit": versions()["git_revision"] or "unknown",
        "device": device,
        "tiny": tiny,
        "seconds": {},
    }
    stages, on_cpu = Stages(device, tiny, root), Stages("cpu", tiny, root)
    acts: dict[str, Callable[[], dict[str, Any]]] = {
        "machine": stages.machine, "tests": stages.tests, "reference": stages.reference,
        "engines on the CPU": on_cpu.engines, "engines": stages.engines, "products": stages.products,
        "parts": stages.parts, "speed": stages.speed, "peers": partial(stages.peers, gpu_speed.PEERS),
        "peers compiled": partial(stages.peers, gpu_speed.COMPILED),
    }  # fmt: skip
    patience = 4 if device == "cpu" else 1  # a try is slow on a busy machine
    for name, act in acts.items():
        left, at = patience * TOTAL - (time.perf_counter() - began), time.perf_counter()
        result[name] = limited(act, min(patience * LIMITS[name], left)) if left > 1 else {"failed": "no time was left"}
        if name == "engines" and not any("failed" in result[each] for each in ("engines", "engines on the CPU")):
            result[name] = compare_engines(result[name], result.pop("engines on the CPU"))
        result["seconds"][name] = round(time.perf_counter() - at, 1)
        report(result)
    return result


def verdict(result: dict[str, Any]) -> list[str]:
    """Return a sentence for each stage that failed or is not right."""
    sentences = []
    for name in LIMITS:
        stage = result.get(name, {})
        if "failed" in stage:
            sentences.append(f"{name}: {stage['failed'].strip().splitlines()[-1]}")
        elif not stage.get("right", True):
            sentences.append(f"{name}: a difference is above its bar, see the JSON")
    return sentences


def main(argv: Sequence[str]) -> None:
    """Run the stages; ends with status 1 if one of them is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=user_path, default=Path("check_gpu.json"),
        help="write the JSON here, after every stage (default: check_gpu.json)",
    )  # fmt: skip
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small sizes, for a try in seconds")
    options = parser.parse_args(argv)
    with ends_on_mistake():
        require(
            options.device == "cpu" or torch.cuda.is_available(),
            "torch sees no GPU on this machine: check the driver and torch.version.cuda, or try the script with "
            "--device cpu --tiny.",
        )

    def report(result: dict[str, Any]) -> None:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        stage, seconds = list(result["seconds"].items())[-1]
        print(f"{stage}: {seconds} s", flush=True)

    wrong = verdict(check(options.device, options.tiny, ROOT, report))
    print("\n".join(wrong) if wrong else "all stages are right")
    sys.exit(1 if wrong else 0)
