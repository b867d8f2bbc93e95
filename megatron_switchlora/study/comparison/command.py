"""Compare training methods fairly: every one at its own swept rates, over several seeds, in one table and plot.

    python tools/compare.py tiny_shakespeare --data input.txt --jobs 2
    python tools/compare.py tiny_shakespeare --data input.txt --timing
    python tools/compare.py llama_350m --launcher "srun --kill-on-bad-exit=1 {python} {script}"

SETTING is a YAML, or the name of one in tools/settings (their fields: study/comparison/settings.py). Every run is a
command of launch/pretrain.py in the work folder. `optim.lr` and `optim.dense_lr` of a method are swept at seed 0: with
`sweep: coordinate` the best point's neighbours at half and double of either rate are tried until none is better, with
`sweep: grid` all listed pairs; the best point then runs at the other seeds, those of the best methods at more. A run
that diverges is a result: its loss is infinite. Stop or kill the command at any time: finished runs are kept in one
JSON, and the same command goes on, a run under way from its own checkpoint. An option that some run would refuse is
told before anything trains. `--set` gives an option another value in every run. `--timing` measures step times apart,
runs in turn and one at a time: what is read off runs that shared the machine is no comparison. `--report` writes table
and plot of what is there; the table follows each run.
"""

from __future__ import annotations

import argparse
import math
import signal
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from statistics import mean
from typing import Any, Optional

from megatron_switchlora.config.command_line import require_utf8
from megatron_switchlora.config.errors import UserError, require
from megatron_switchlora.config.field_checks import field_types, fit_word, number_from, takes_text
from megatron_switchlora.config.yaml_text import load_yaml
from megatron_switchlora.disk import shown, user_path
from megatron_switchlora.run.figures import outlive_terminal
from megatron_switchlora.startup.door import settle
from megatron_switchlora.startup.signals import REQUEUE
from megatron_switchlora.study.comparison.report import of_method, write_report
from megatron_switchlora.study.comparison.results import Results
from megatron_switchlora.study.comparison.runs import Runner, Stopped, text_of
from megatron_switchlora.study.comparison.settings import Point, Setting, read_setting, validate_points
from megatron_switchlora.study.comparison.timing import time_methods
from megatron_switchlora.study.places import ROOT

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def sweep(setting: Setting, method: str, runner: Runner) -> Point:
    """The best rates of a method at seed 0; of a coordinate sweep, the point whose neighbours are all no better."""
    starts = setting.methods[method].starts()
    if setting.sweep == "none":
        return starts[0]
    if setting.sweep == "grid":
        return min(zip(starts, runner.losses(method, starts), strict=True), key=lambda pair: pair[1])[0]
    best = starts[0]
    while True:
        points = [best, *best.neighbours()]
        losses = runner.losses(method, points)
        winner = points[losses.index(min(losses))]  # the first of equals: where all diverge the search ends
        if winner == best:
            return best
        best = winner


def compare(setting: Setting, runner: Runner) -> None:
    """Sweep, then seeds, then more seeds of the best methods; methods advance side by side as far as jobs allow."""

    def settle(method: str) -> tuple[Point, float]:
        runner.results.choose(method, None)
        point = sweep(setting, method, runner)
        runner.results.choose(method, point)
        return point, mean(runner.seeds(method, point, range(setting.seeds)))

    with ThreadPoolExecutor(len(setting.selected)) as pool:
        settled = finish(runner, {method: pool.submit(settle, method) for method in setting.selected})
        ranked = sorted(settled, key=lambda method: settled[method][1])
        finish(runner, {
            method: pool.submit(runner.seeds, method, settled[method][0], range(setting.best.seeds))
            for method in ranked[: setting.best.methods] if math.isfinite(settled[method][1])
        })  # fmt: skip


def finish(runner: Runner, futures: dict[str, Future[Any]]) -> dict[str, Any]:
    """All results; when one fails, or a signal asks to stop, the runs under way are stopped first."""
    try:
        waiting = set(futures.values())
        while waiting:  # in short spells: of two signals at once the second can leave an endless one asleep
            done, waiting = wait(futures.values(), timeout=0.5, return_when="FIRST_EXCEPTION")
            for future in done:
                future.result()  # raises what a method's thread has raised
        return {name: future.result() for name, future in futures.items()}
    except BaseException:
        runner.stop()
        raise


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("setting", type=user_path, metavar="SETTING", help="a YAML, or a name of tools/settings")
    parser.add_argument("--data", type=user_path, help="what {data} is in the setting's options")
    parser.add_argument("--methods", help="run only these of the setting's methods, with commas")
    parser.add_argument("--set", action="append", default=[], metavar="OPTION=VALUE", dest="changes",
                        help="an option's value in every run, as train.steps=4800")  # fmt: skip
    parser.add_argument("--out", type=user_path, help="results; by default benchmarks/compare_SETTING.json. "
                        "The table goes to .md and the plot to .png beside it")  # fmt: skip
    parser.add_argument("--work", type=user_path, help="run folders and logs; by default runs/compare/SETTING")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once (default: 1)")
    parser.add_argument("--launcher", help="command that starts a run, instead of the setting's: {python}, {script}, "
                        "{port} (a free one) are filled in, the options follow")  # fmt: skip
    parser.add_argument("--world", type=number_from(1), help="ranks that this launcher starts")
    parser.add_argument("--keep", action="store_true", help="keep checkpoints and final models of finished runs")
    parser.add_argument("--timing", action="store_true", help="measure step times, nothing else")
    parser.add_argument("--report", action="store_true", help="write table and plot of what is there, and stop")
    parser.add_argument("--dry_run", action="store_true", help="check every method, print its first command and stop")
    return parser


def read_changes(given: list[str]) -> dict[str, Any]:
    """Options of --set, their values read as YAML; a text as it was typed."""
    for entry in given:
        require("=" in entry, f"--set {entry}: give an option and its value, as --set train.steps=4800.")
    return dict(_changed(*entry.split("=", 1)) for entry in given)


def _changed(name: str, text: str) -> tuple[str, Any]:
    if takes_text(name):  # as it was typed
        return name, fit_word(name, text, field_types()[name])
    try:
        return name, load_yaml(text)
    except ValueError as error:
        raise UserError(f"--set {name}={text} is not valid YAML: {error}.") from None


def act(arguments: argparse.Namespace) -> None:
    overrides = {key: getattr(arguments, key) for key in ("launcher", "world") if getattr(arguments, key) is not None}
    names: Optional[list[str]] = arguments.methods.split(",") if arguments.methods else None
    setting = read_setting(arguments.setting, names, overrides, read_changes(arguments.changes))
    configs = validate_points(setting, arguments.data or (Path("data") if arguments.report else None))
    out = arguments.out or ROOT / "benchmarks" / f"compare_{setting.name}.json"
    results, text = Results(out), None
    if not (arguments.report or arguments.dry_run or arguments.timing):
        text = text_of(configs[setting.selected[0]])  # all methods read one text
        results.require_text(text, str(arguments.data or "The data"))
    runner = Runner(
        setting, results, arguments.work or Path("runs") / "compare" / setting.name,
        data=arguments.data and arguments.data.absolute(), jobs=arguments.jobs, keep=arguments.keep, text=text,
    )  # fmt: skip
    if arguments.dry_run:
        for method in setting.selected:
            point = setting.methods[method].starts()[0]
            command = " ".join(runner.command(method, point, 0))
            print(f"{method}: {configs[method].train.steps:,} steps, {point}\n  {command}")
        return
    if not arguments.report:
        there = sum(len(of_method(setting, runner.results, method)) for method in setting.selected)
        if there and not arguments.timing:
            print(f"{out} has {there} runs of these methods, which are not repeated: --out begins anew.", flush=True)
        runner.results.report = lambda: write_report(setting, configs, runner.results, plot=False)
        with runner:
            (time_methods if arguments.timing else compare)(setting, runner)
    print(write_report(setting, configs, runner.results))


def leave(number: int, frame: object) -> None:
    """Once: a second signal would strike amid the stopping of runs."""
    for each in STOPS:
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt(signal.Signals(number).name)


def main(argv: Sequence[str]) -> None:
    arguments = make_parser().parse_args(argv)
    if not (arguments.report or arguments.dry_run):
        outlive_terminal()
    for number in STOPS:
        signal.signal(number, leave)
    try:
        require_utf8(argv)
        settle(first=True)
        act(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # of the results, the work folder or a log
        where = shown(error.filename or "a file")
        print(
            f"error: {where} cannot be read or written ({error.strerror}): the same command goes on.", file=sys.stderr
        )
        sys.exit(2)
    except (KeyboardInterrupt, Stopped) as stop:
        print(f"stopped ({stop}): the same command goes on", file=sys.stderr)
        sys.exit(REQUEUE)
