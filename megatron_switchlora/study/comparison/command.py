"""Compare training methods fairly: every one at its own swept rates, over several seeds, in one table and plot.

    switchlora compare tiny_shakespeare --data input.txt --jobs 2
    switchlora compare tiny_shakespeare --data input.txt --timing
    switchlora compare llama_350m --launcher "srun --kill-on-bad-exit=1 {python} {script}"

SETTING is a YAML, or the name of one in tools/settings (their fields: study/comparison/settings.py). Every run is a
command of launch/pretrain.py in the work folder. `optim.lr` and `optim.dense_lr` of a method are swept at seed 0: with
`sweep: coordinate` the best point's neighbours at half and double of either rate are tried until none is better, with
`sweep: grid` all listed pairs; the best point then runs at the other seeds, those of the best methods at more. A run
that diverges is a result: its loss is infinite. Stop or kill the command at any time: finished runs are kept in one
JSON, and the same command continues, a run under way from its own checkpoint. An option that some run would refuse is
reported before anything trains. `--set` gives an option another value in every run. `--timing` measures step times
separately, one run at a time, methods interleaved: times of runs that shared the machine are no comparison. `--report`
writes table and plot of what is there; the table follows each run.

    switchlora compare books_5m --data BOOKS --methods full,switchlora --pack inputs
    switchlora compare inputs/books_5m.yaml --inputs inputs --methods full,switchlora --batch found.json
    switchlora compare books_5m --merge found.json --out benchmarks/compare_books_5m_gpu.json

`--batch` trains many runs in one call of at most --minutes, in few processes on one device, each of which imports torch
once (study/comparison/batch.py). The folder of --pack, at most 64 MiB, is all that the machine needs beside the code.
Results remember their device, and a table has those of one.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

from megatron_switchlora.config.command_line import require_utf8
from megatron_switchlora.config.errors import UserError, require
from megatron_switchlora.config.field_checks import field_types, fit_word, number_from, takes_text
from megatron_switchlora.config.run import RunConfig
from megatron_switchlora.config.yaml_text import load_yaml
from megatron_switchlora.disk import shown, user_path
from megatron_switchlora.run.figures import outlive_terminal
from megatron_switchlora.shipped import checkout
from megatron_switchlora.startup.door import settle
from megatron_switchlora.startup.signals import REQUEUE
from megatron_switchlora.study.comparison.report import of_method, write_report
from megatron_switchlora.study.comparison.results import Results
from megatron_switchlora.study.comparison.runner import Stopped
from megatron_switchlora.study.comparison.runs import CommandRunner, certain_device, text_of
from megatron_switchlora.study.comparison.settings import Setting, read_setting, setting_file, validate_points
from megatron_switchlora.study.comparison.sweeps import compare
from megatron_switchlora.study.comparison.timing import time_methods

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def default_out(name: str) -> Path:
    """Return where results go by default: benchmarks/ of the checkout, else the working folder."""
    root = checkout()
    return (root / "benchmarks" if root else Path.cwd()) / f"compare_{name}.json"


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
    batch = parser.add_argument_group("a batch: many runs in one call, in few processes on one device")
    batch.add_argument("--batch", type=user_path, metavar="OUT.json", help="run what --out lacks; write results here")
    batch.add_argument("--minutes", type=number_from(0, float), default=8.0, help="the call's limit (default: 8)")
    batch.add_argument("--processes", type=number_from(1), help="runs at once (default: 1 on the CPU, 4 on a GPU)")
    batch.add_argument("--pack", type=user_path, metavar="DIR", help="write what a batch elsewhere needs, and stop")
    batch.add_argument("--inputs", type=user_path, metavar="DIR", help="what --pack has written, instead of --data")
    batch.add_argument("--merge", type=user_path, metavar="OUT.json", help="add a batch's runs to --out, and report")
    return parser


def read_changes(given: list[str]) -> dict[str, Any]:
    """Read the options of --set, their values as YAML, a text as it was typed."""
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


def act(arguments: argparse.Namespace) -> int:
    """Do what is asked for, and return the exit status."""
    overrides = {key: getattr(arguments, key) for key in ("launcher", "world") if getattr(arguments, key) is not None}
    names: Optional[list[str]] = arguments.methods.split(",") if arguments.methods else None
    setting = read_setting(arguments.setting, names, overrides, read_changes(arguments.changes))
    reads_nothing = arguments.report or arguments.merge
    data = arguments.data or arguments.inputs or (Path("data") if reads_nothing else None)
    configs = validate_points(setting, data)
    out = arguments.out or default_out(setting.name)
    if arguments.pack:
        pack_inputs(setting, configs, arguments)
        return 0
    results = Results(out)
    if arguments.batch:
        return start_batch(setting, configs, results, arguments)
    if arguments.merge:
        require(arguments.merge.is_file(), f"{arguments.merge} is not there: give the file that --batch has written.")
        added = results.merge(Results(arguments.merge))
        print(f"{added} runs of {arguments.merge} are added to {out}.")
    if not reads_nothing and not run_commands(setting, configs, results, arguments):
        return 0
    print(write_report(setting, configs, results))
    return 0


def run_commands(
    setting: Setting, configs: dict[str, RunConfig], results: Results, arguments: argparse.Namespace
) -> bool:
    """Run what is missing, or time the methods; return whether that was asked for."""
    text, first = None, configs[setting.selected[0]]
    if not (arguments.dry_run or arguments.timing):
        text = text_of(first)  # all methods read one text
        results.require_text(text, str(arguments.data or "The data"))
    if not arguments.dry_run:
        results.require_device(certain_device(setting, first), "What runs here")
    runner = CommandRunner(
        setting, results, arguments.work or Path("runs") / "compare" / setting.name,
        data=arguments.data and arguments.data.absolute(), jobs=arguments.jobs, keep=arguments.keep, text=text,
    )  # fmt: skip
    if arguments.dry_run:
        for method in setting.selected:
            point = setting.methods[method].starts()[0]
            command = " ".join(runner.command(method, point, 0))
            print(f"{method}: {configs[method].train.steps:,} steps, {point}\n  {command}")
        return False
    known = sum(len(of_method(setting, results, method)) for method in setting.selected)
    if known and not arguments.timing:
        print(
            f"{results.path} has {known} runs of these methods, which are not repeated: --out starts afresh.",
            flush=True,
        )
    results.report = lambda: write_report(setting, configs, results, plot=False)
    with runner:
        (time_methods if arguments.timing else compare)(setting, runner)
    return True


def pack_inputs(setting: Setting, configs: dict[str, RunConfig], arguments: argparse.Namespace) -> None:
    """Write the folder that a batch elsewhere needs, and print what to carry and to type there."""
    from megatron_switchlora.study.comparison.batch import require_batch
    from megatron_switchlora.study.comparison.inputs import pack

    require_batch(setting, configs)
    folder: Path = arguments.pack
    size = pack(setting, setting_file(arguments.setting), configs[setting.selected[0]], folder)
    words = ["tools/compare.py", f"{folder}/{setting.name}.yaml", "--inputs", str(folder), "--batch", "OUT.json"]
    words += ["--methods", arguments.methods] if arguments.methods else []
    words += [word for change in arguments.changes for word in ("--set", change)]
    print(f"{folder} has {size / 2**20:.1f} MiB. Carry it and this code, and run there:\n  python {shlex.join(words)}")


def start_batch(setting: Setting, configs: dict[str, RunConfig], known: Results, arguments: argparse.Namespace) -> int:
    """Run what is missing in few processes, within the minutes, and return the exit status."""
    from megatron_switchlora.study.comparison import batch
    from megatron_switchlora.study.comparison.inputs import open_inputs, prepare_inputs

    batch.require_batch(setting, configs)
    config = configs[setting.selected[0]]
    inputs = open_inputs(arguments.inputs, setting, config) if arguments.inputs else prepare_inputs(config)
    results = Results(arguments.batch)
    results.require_text(inputs.text, str(arguments.inputs or arguments.data or "The data"))
    runner = batch.BatchRunner(
        setting, results, (arguments.work or Path("runs") / "compare" / setting.name) / "batch", inputs,
        data=(arguments.data or arguments.inputs or Path()).absolute(), requested=config.train.device,
        processes=arguments.processes or batch.default_processes(config.train.device),
        deadline=time.monotonic() - batch.age() + 60 * arguments.minutes - batch.RESERVE,
    )  # fmt: skip
    return batch.run_batch(runner, known)


def leave(number: int, frame: object) -> None:
    """Raise KeyboardInterrupt once: a second signal would strike amid the stopping of runs."""
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
        sys.exit(act(arguments))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # of the results, the work folder or a log
        where = shown(error.filename or "a file")
        print(
            f"error: {where} cannot be read or written ({error.strerror}): the same command continues.", file=sys.stderr
        )
        sys.exit(2)
    except (KeyboardInterrupt, Stopped) as stop:
        print(f"stopped ({stop}): the same command continues", file=sys.stderr)
        sys.exit(REQUEUE)
