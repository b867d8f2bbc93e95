"""The timing pass of tools/compare.py: how long a step of each method takes, as a ratio to full-rank training.

In each round every method runs a few steps in turn, one at a time, in a fresh folder: the real run's options, ended by
train.stop_after_steps, so that schedules stand where the run begins. A method's step time in a round is the median of
its steps after the first `skip`; it is divided by the reference's of the same round, and the median over rounds is
reported. Rates do not matter to it, so each method's starting point serves. What happens in few steps is not in a
median: LTE's merges, ReLoRA's restarts and GaLore's decompositions. The table has a note of it.
"""

from __future__ import annotations

import shutil
from statistics import median
from typing import Any, Optional

from megatron_switchlora.config.errors import require
from megatron_switchlora.run.folder import read_meta
from megatron_switchlora.run.machine import machine
from megatron_switchlora.run.metrics_log import read_records
from megatron_switchlora.study.comparison.runner import device_of, step_seconds
from megatron_switchlora.study.comparison.runs import CommandRunner
from megatron_switchlora.study.comparison.settings import Setting


def time_methods(setting: Setting, runner: CommandRunner) -> None:
    """Measure all methods and put seconds and ratios by round into the results.

    Raises:
        UserError: the reference is not among the methods, or a run ends before it has been timed.
    """
    require(
        setting.reference in setting.selected,
        f"Step times are ratios to {setting.reference!r}: put it among the methods, or change the setting's reference.",
    )
    seconds: dict[str, list[float]] = {method: [] for method in setting.selected}
    devices: dict[str, Optional[str]] = {}
    for number in range(setting.timing.rounds):
        for method in setting.selected:
            spent, devices[method] = _measure(setting, runner, method)
            seconds[method].append(spent)
            print(f"round {number + 1}, {method}: {spent:.4f} s per step", flush=True)
        for method, values in seconds.items():  # what a stop leaves are whole rounds
            pairs = zip(values, seconds[setting.reference], strict=True)
            ratios = [of_method / of_reference for of_method, of_reference in pairs]
            entry = {
                "step_seconds": list(values),
                "ratio": median(ratios),
                "lowest": min(ratios),
                "highest": max(ratios),
                "machine": machine(),
                "device": devices[method],
            }
            runner.results.add_timing(method, entry)


def _measure(setting: Setting, runner: CommandRunner, method: str) -> tuple[float, Optional[str]]:
    """Return the median seconds of a step in one short run, and its device."""
    timing = setting.timing
    options: dict[str, Any] = setting.run_options(method, setting.methods[method].starts()[0], 0, False)
    steps, micro = options.get("train.steps", 600), options.get("train.micro_batch_size", 8)
    require(
        timing.skip < timing.steps < steps, f"timing.steps {timing.steps} must lie between timing.skip and train.steps."
    )
    options |= {
        "train.stop_after_steps": timing.steps, "train.eval_interval": steps, "checkpoint.interval": 0,
        "train.eval_samples": micro * setting.launch(method)[1], "resume": "none",
    }  # fmt: skip
    folder = runner.work / f"timing_{method}"
    shutil.rmtree(folder, ignore_errors=True)
    diverged = runner.execute(method, options, folder, may_stop=True)
    records = [record for record in read_records(folder / "metrics.jsonl") if "loss" in record]
    require(
        not diverged and len(records) == timing.steps,
        f"{folder} has {len(records)} steps instead of {timing.steps}: see {folder}.log.",
    )
    device = device_of(read_meta(folder))
    shutil.rmtree(folder)
    return median(step_seconds(records[timing.skip :])), device
