"""tools/compare.py on a trainer that answers at once: sweep, seeds, divergence, stop and resume, timing, table."""

from __future__ import annotations

import fcntl
import json
import math
import signal
import sys
import time
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from megatron_switchlora.config.data import DataConfig
from megatron_switchlora.config.errors import UserError
from megatron_switchlora.config.run import RunConfig
from megatron_switchlora.study.comparison import command
from megatron_switchlora.study.comparison.runner import DIVERGED, read_run
from megatron_switchlora.study.comparison.runs import text_of
from tests.dist.launch import REPOSITORY

# The least loss is at lr 0.02, dense_lr 0.04; lr 0.16 diverges; a run writes its command to calls.txt.
TRAINER = """
import json, math, pathlib, sys
words = dict(word[2:].split("=", 1) for word in sys.argv[1:-2])
folder = pathlib.Path(sys.argv[-1])
with (folder.parents[1] / "calls.txt").open("a") as calls:
    calls.write(folder.name + chr(10))
if (folder.parents[1] / "stop_here").exists() and words["train.seed"] == "1":
    print("stopped after step 3 as asked"); sys.exit(75)
lr, dense, seed = float(words["optim.lr"]), float(words.get("optim.dense_lr", 0.04)), int(words["train.seed"])
folder.mkdir(parents=True, exist_ok=True)
steps = int(words.get("train.stop_after_steps", 20))
name = words["method.name"]
seconds = {"full": 0.5, "lora": 0.25}.get(name, 1.0)
with (folder / "metrics.jsonl").open("w") as file:
    for step in range(1, steps + 1):
        slow = 10 if step <= 2 else 1
        record = dict(step=step, loss=2.0, tokens=64 * step, seconds=1.0, tokens_per_second=64 / seconds / slow,
                      peak_memory_bytes=10**9, dp_bytes=0, merge_bytes=1_000_000 * (step % 10 == 0))
        file.write(json.dumps(record) + chr(10))
    if lr > 0.15:
        print("error: Step 9 gave loss nan, gradient norm nan: not finite, so the step was not applied"); sys.exit(2)
    loss = 1 + abs(math.log2(lr / 0.02)) + abs(math.log2(dense / 0.04)) + seed * 0.1 + (name == "lora")
    file.write(json.dumps(dict(step=20, val_loss=loss, val_ppl=1.0)) + chr(10))
meta = dict(val_loss=loss, data="cache", device="cpu", vocab_size=300, parameters=dict(trainable=50, full_rank=100))
(folder / "meta.json").write_text(json.dumps(meta))
"""
SETTING: dict[str, Any] = {
    "about": "A test.",
    "options": {"model.hidden_size": 32, "train.steps": 20, "train.warmup_steps": 2, "method.rank": 4,
                "data.source": "files", "data.files": "{data}/*.txt", "data.vocab_size": 300},
    "seeds": 2,
    "best": {"methods": 1, "seeds": 3},
    "timing": {"rounds": 2, "steps": 6, "skip": 2},
    "methods": {
        "full": {"options": {"method.name": "full"}, "lr": 0.04, "dense_lr": 0.04},
        "lora": {"options": {"method.name": "lora"}, "lr": 0.02},
    },
}  # fmt: skip


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """tools/compare.py as a module; the text, which nobody reads, has the trainer's fingerprint."""
    monkeypatch.setattr(command, "text_of", lambda config: "cache")
    return command


def start(tool: ModuleType, folder: Path, *more: str, **changes: Any) -> dict[str, Any]:
    """Act on the setting with some fields changed; the results."""
    (folder / "trainer.py").write_text(TRAINER)
    (folder / "short.yaml").write_text(yaml.safe_dump({**SETTING, **changes}))
    words = [str(folder / "short.yaml"), "--data", str(folder), "--out", str(folder / "out.json"), "--jobs", "3"]
    words += ["--work", str(folder / "work"), "--launcher", f"{sys.executable} {folder / 'trainer.py'}", *more]
    arguments: Namespace = tool.make_parser().parse_args(words)
    tool.act(arguments)
    return json.loads((folder / "out.json").read_text()) if (folder / "out.json").exists() else {}


def test_a_coordinate_sweep_ends_at_the_best_point_and_its_seeds(tool: ModuleType, tmp_path: Path) -> None:
    found = start(tool, tmp_path)
    assert found["chosen"] == {"full": [0.02, 0.04], "lora": [0.02, None]}
    full = [run for run in found["runs"].values() if run["method"] == "full"]
    best = [run for run in full if (run["lr"], run["dense_lr"]) == (0.02, 0.04)]
    assert sorted(run["seed"] for run in best) == [0, 1, 2]  # the best method's have one more
    assert len([run for run in found["runs"].values() if run["method"] == "lora"]) == 3 + 1
    assert len(full) == 5 + 3 + 2  # a star, three new points of the next, two seeds
    table = (tmp_path / "out.md").read_text()
    assert "| full | - | 50.0% | 0.02, 0.04 | 3 | 1.100 ± 0.100 |" in table
    assert "| lora | 4 | 50.0% | 0.02, 0.02 | 2 | 2.050 ± 0.071 |" in table and "(formula)" in table
    assert (tmp_path / "out.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    calls = (tmp_path / "calls.txt").read_text()
    assert start(tool, tmp_path) == found and (tmp_path / "calls.txt").read_text() == calls  # nothing is run twice


def test_some_methods_run_and_the_table_keeps_all(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start(tool, tmp_path, "--methods", "lora", "--dry_run")
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()[::2]] == ["lora"]
    start(tool, tmp_path, sweep="none")
    rows = (tmp_path / "out.md").read_text().splitlines()
    start(tool, tmp_path, "--methods", "full", "--timing", sweep="none")
    calls = (tmp_path / "calls.txt").read_text()
    assert "timing_full" in calls and "timing_lora" not in calls
    table = (tmp_path / "out.md").read_text()
    (lora,) = (row for row in rows if row.startswith("| lora |"))
    assert lora in table and "1.00 (1.00 to 1.00)" in table


def test_an_option_set_for_every_run_makes_other_runs(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = start(tool, tmp_path, sweep="none", seeds=1, best={"methods": 0})
    again = ["--set", "train.steps=30", "--set", "method.rank=3", "--dry_run"]
    start(tool, tmp_path, *again, sweep="none", sweep_options={"train.steps": 10})
    said = capsys.readouterr().out
    assert "lora: 30 steps" in said and "--method.rank=3" in said and "--train.steps=10" not in said
    found = start(tool, tmp_path, *again[:-1], sweep="none", seeds=1, best={"methods": 0})
    assert len(first["runs"]) == 2 and len(found["runs"]) == 4
    assert "--data DATA --set train.steps=30 --set method.rank=3`" in (tmp_path / "out.md").read_text()
    start(tool, tmp_path, *again[:-1], sweep="none", seeds=1, best={"methods": 0})
    assert "has 2 runs of these methods, which are not repeated" in capsys.readouterr().out
    with pytest.raises(UserError, match="give an option and its value"):
        start(tool, tmp_path, "--set", "train.steps")


def test_a_grid_with_a_diverging_point_and_a_shorter_sweep(tool: ModuleType, tmp_path: Path) -> None:
    methods = {"lora": {"options": {"method.name": "lora"}, "lr": [0.04, 0.16], "dense_lr": [0.04, 0.08]}}
    found = start(tool, tmp_path, sweep="grid", sweep_options={"train.steps": 10}, methods=methods, seeds=1)
    assert found["chosen"] == {"lora": [0.04, 0.04]}
    runs = list(found["runs"].values())
    assert [run["val_loss"] for run in runs if run["lr"] == 0.16] == [None, None]
    assert len([run for run in runs if run["sweep"]]) == 4 and len([run for run in runs if not run["sweep"]]) == 3
    table = (tmp_path / "out.md").read_text()
    assert "0.04, 0.04 (edge)" in table and "2 diverged" in table


def test_a_stopped_comparison_goes_on(tool: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "stop_here").touch()
    with pytest.raises(tool.Stopped):
        start(tool, tmp_path, sweep="none")
    (tmp_path / "stop_here").unlink()
    content = json.loads((tmp_path / "out.json").read_text())
    finished = {f"{key} text cache".replace(" ", "_") for key in content["runs"]}
    before = (tmp_path / "calls.txt").read_text().split()
    found = start(tool, tmp_path, sweep="none")
    after = (tmp_path / "calls.txt").read_text().split()[len(before) :]
    assert len(found["runs"]) == 5 and set(found["chosen"]) == {"full", "lora"}
    assert finished and not finished & set(after)


def test_a_second_signal_does_not_strike_amid_the_stop(tool: ModuleType) -> None:
    before = {number: signal.getsignal(number) for number in tool.STOPS}
    try:
        with pytest.raises(KeyboardInterrupt, match="SIGINT"):
            tool.leave(signal.SIGINT, None)
        for number in tool.STOPS:
            signal.raise_signal(number)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_run_of_a_killed_comparison_ends_first_and_can_be_left(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start(tool, tmp_path, "--methods", "full", "--dry_run")
    setting = tool.read_setting(tmp_path / "short.yaml", None, {"launcher": f"{sys.executable} {tmp_path}/trainer.py"})
    point, folder = setting.methods["full"].starts()[0], tmp_path / "work" / "one"
    options = setting.run_options("full", point, 0, False)
    folder.mkdir(parents=True)
    with (folder / ".lock").open("a") as orphan, ThreadPoolExecutor() as pool:
        fcntl.flock(orphan, fcntl.LOCK_EX)
        for ends in (False, True):
            runner = tool.CommandRunner(setting, tool.Results(tmp_path / "out.json"), tmp_path / "work", tmp_path)
            waiting = pool.submit(runner.execute, "full", options, folder)
            while "one still runs, from an earlier comparison" not in capsys.readouterr().out:
                assert not waiting.done()
                time.sleep(0.05)
            if ends:
                fcntl.flock(orphan, fcntl.LOCK_UN)
                assert waiting.result(20) is False
            else:
                runner.stop()
                with pytest.raises(tool.Stopped):
                    waiting.result(20)
            assert (tmp_path / "calls.txt").exists() == ends


def test_timing_divides_by_full_rank_in_the_same_round(tool: ModuleType, tmp_path: Path) -> None:
    found = start(tool, tmp_path, "--timing")
    assert found["timing"]["lora"]["ratio"] == 0.5 and found["timing"]["full"]["step_seconds"] == [0.5, 0.5]
    assert found["runs"] == {} and "timing_lora" in (tmp_path / "calls.txt").read_text()
    assert "0.50 (0.50 to 0.50)" in (tmp_path / "out.md").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"methods": {"x": {"options": {"method.rang": 3}, "lr": 0.1}}},
            "method x: Unknown option or key 'method.rang'",
        ),
        ({"methods": {"x": {"options": {"method.name": "nosuch"}, "lr": 0.1}}}, "method.name"),
        ({"methods": {"x": {"lr": [0.1, 0.2]}}}, "lists of rates need 'sweep: grid'"),
        ({"methods": {"x": {"lr": -1}}}, "must be positive numbers"),
        ({"methods": {"x": {"dense_lr": 1.0}}}, "missing 1 required positional argument: 'lr'"),
        ({"sweeps": "grid"}, "unknown field sweeps"),
        ({"world": 3}, "must be a multiple of train.micro_batch_size"),
        ({"methods": {}}, "must name its methods"),
        ({"methods": {3: {"lr": 0.1}}}, "must name its methods"),
        ({"methods": {"x": {"lr": [], "dense_lr": 1.0}}, "sweep": "grid"}, "a list of rates is empty"),
        ({"methods": {"x": {"lr": 0.1, "options": {"optim.lr": 0.2}}}}, r"method x: optim\.lr cannot be among"),
        ({"options": {"train.seed": 3, "resume": "none"}}, r"resume, train\.seed cannot be among"),
        ({"seeds": "3"}, "seeds must be a whole number, not '3'"),
        ({"seeds": 2.5}, "seeds must be a whole number"),
        ({"options": None}, "options must be a section of fields, not None"),
        ({"configs": "launch/configs/llama_130m.yaml"}, "configs must be a list of strings"),
        ({"configs": [3]}, r"configs must be a list of strings, not \[3\]"),
        ({"ds_config": 3}, "ds_config must be a string, not 3"),
        ({"best": {"methods": -1}}, r"best\.methods must not be negative"),
        ({"best": {"seeds": "3"}}, "best: seeds must be a whole number"),
        ({"methods": {"x": {"lr": [0.1, math.nan]}}, "sweep": "grid"}, r"must be positive numbers, not \[nan\]"),
        ({"methods": {"x": {"lr": math.inf}}}, "must be positive numbers"),
        ({"reference": "nosuch"}, "reference must be one of the methods full, lora, not 'nosuch'"),
        ({"timing": {"steps": 4, "skip": 4}}, r"timing\.steps 4 must be above timing\.skip 4"),
        ({"timing": {"rounds": 0}}, r"timing\.rounds must be at least 1, not 0"),
    ],
)
def test_mistakes_are_told_before_anything_runs(
    tool: ModuleType, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        start(tool, tmp_path, **changes)
    assert not (tmp_path / "calls.txt").exists()


def test_a_methods_own_launcher_and_world_are_checked(tool: ModuleType, tmp_path: Path) -> None:
    for own, message in (({"world": 0}, "world of method x must be at least 1"), ({"launcher": " "}, "be a command")):
        (tmp_path / "own.yaml").write_text(yaml.safe_dump({"methods": {"x": {"lr": 0.1, **own}}}))
        with pytest.raises(UserError, match=message):
            tool.read_setting(tmp_path / "own.yaml", None, {})


def test_a_missing_package_is_told_before_anything_runs(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "galore_torch.galore_projector", None)
    galore = {"options": {"method.name": "galore", "ds_config": "ds_configs/zero0.json"}, "lr": 0.01}
    with pytest.raises(UserError, match=r"method galore: method\.name galore needs the package galore-torch"):
        start(tool, tmp_path, "--dry_run", methods={**SETTING["methods"], "galore": galore})
    start(tool, tmp_path, "--dry_run")


def test_heads_on_ranks_have_their_own_launcher_and_their_merges(tool: ModuleType, tmp_path: Path) -> None:
    options = {"method.name": "lte", "method.lte.merge_interval": 10, "parallel.lte_heads": 2}
    heads = {"options": options, "lr": 0.02, "launcher": f"{sys.executable} {tmp_path / 'trainer.py'}", "world": 2}
    (tmp_path / "trainer.py").write_text(TRAINER)
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({**SETTING, "sweep": "none", "methods": {"lte": heads}}))
    words = [str(tmp_path / "own.yaml"), "--data", str(tmp_path), "--out", str(tmp_path / "out.json")]
    parse = tool.make_parser().parse_args
    tool.act(parse([*words, "--work", str(tmp_path / "work")]))  # not the setting's launcher, which would train
    table = (tmp_path / "out.md").read_text()
    assert "| lte | 4 | 2 x 50.0% | 0.02, 0.001 |" in table and "| 0.00 MB, merges 0.10 MB |" in table
    assert "| 2 x 1,000 MB |" in table
    with pytest.raises(UserError, match=r"world of 1 ranks .*lte_heads 2"):  # another launcher has ranks of its own
        tool.act(parse([*words, "--launcher", "{python} {script}", "--dry_run"]))


def test_a_table_of_one_data_rank_at_stage_2(tool: ModuleType, tmp_path: Path) -> None:
    start(tool, tmp_path, sweep="none", ds_config="ds_configs/zero2.json")
    assert "(formula)" in (tmp_path / "out.md").read_text()


def test_another_text_and_missing_data_are_refused(tool: ModuleType, tmp_path: Path) -> None:
    start(tool, tmp_path, sweep="none")
    calls = (tmp_path / "calls.txt").read_text()
    content = json.loads((tmp_path / "out.json").read_text())
    (tmp_path / "out.json").write_text(json.dumps({**content, "data": "other", "runs": {}}))
    with pytest.raises(UserError, match=r"has tokens of fingerprint cache, the runs in .* read other"):
        start(tool, tmp_path, sweep="none")
    assert (tmp_path / "calls.txt").read_text() == calls
    with pytest.raises(UserError, match="give with --data"):
        tool.act(tool.make_parser().parse_args([str(tmp_path / "short.yaml"), "--dry_run"]))


def test_runs_of_another_text_have_folders_of_their_own(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their options are the same, so what one text has trained would pass for the other's."""
    for text in ("cache", "another"):
        monkeypatch.setattr(tool, "text_of", lambda config, text=text: text)
        start(tool, tmp_path, "--methods", "full", sweep="none", seeds=1, best={"methods": 0})
        (tmp_path / "out.json").unlink()
    made = {path.name.split("_text_")[1] for path in (tmp_path / "work").iterdir() if path.is_dir()}
    assert made == {"cache", "another"}


def test_the_text_is_known_by_its_tokens(tool: ModuleType, tmp_path: Path) -> None:
    """The same files elsewhere are the same text; a changed one is another."""

    def text(folder: str, words: str) -> str:
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "a.txt").write_text(words * 200)
        given = {"source": "files", "files": [str(tmp_path / folder / "a.txt")], "tokenizer": "char"}
        return str(text_of(RunConfig(data=DataConfig(**given, cache_dir=str(tmp_path / "cache")))))

    first = text("one", "some words of a text\n")
    assert text("two", "some words of a text\n") == first != text("one", "some words of another\n")


@pytest.mark.parametrize(
    "content",
    [None, [1], {"runs": None}, {"runs": {"x": 3}}, {"runs": {"x": {}}}, {"chosen": {"x": 3}}, {"timing": {"x": {}}}],
)
def test_a_json_of_something_else_is_refused(tool: ModuleType, tmp_path: Path, content: Any) -> None:
    (tmp_path / "out.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="does not hold results of this tool"):
        start(tool, tmp_path, "--report")


def test_words_of_the_command_line_are_checked(tool: ModuleType, tmp_path: Path) -> None:
    for words, message in (
        (["--jobs", "0"], "--jobs must be at least 1, not 0"),
        (["--set", "train.steps=["], "not valid YAML"),
        (["--set", "optim.lr=3"], r"optim\.lr cannot be among"),
    ):
        with pytest.raises(UserError, match=message):
            start(tool, tmp_path, *words)
    assert not (tmp_path / "calls.txt").exists()


def test_a_loss_without_a_perplexity_has_its_row(tool: ModuleType, tmp_path: Path) -> None:
    content = start(tool, tmp_path, sweep="none")
    for run in content["runs"].values():
        run["val_loss"] = 800.0
    (tmp_path / "out.json").write_text(json.dumps(content))
    start(tool, tmp_path, "--report")
    assert "800.000" in (tmp_path / "out.md").read_text()


def test_divergence_is_told_in_the_trainers_words(tool: ModuleType) -> None:
    trainer = (REPOSITORY / "megatron_switchlora" / "train" / "trainer.py").read_text().replace('"\n            f"', "")
    assert all(words in trainer for words in DIVERGED)


@pytest.mark.parametrize("path", sorted((REPOSITORY / "tools" / "settings").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_settings_are_accepted(tool: ModuleType, path: Path) -> None:
    """Every method and point."""
    setting = tool.read_setting(path, None, {})
    for name, config in tool.validate_points(setting, Path("data")).items():
        method = config.method  # with a large s only where B starts at zero
        assert method.scaling <= 1 or name == "lora_ga" or method.initial in ("semi_orthogonal", "classic", "pissa"), (
            name
        )
    assert len(setting.methods) >= (2 if path.stem.endswith(("_seeds", "_long")) else 8)


def test_results_of_other_types_are_refused(tool: ModuleType, tmp_path: Path) -> None:
    content = start(tool, tmp_path, sweep="none", seeds=1, best={"methods": 0})
    key, run = next(iter(content["runs"].items()))
    odd = [("val_loss", "low"), ("curve", [[1, 2]]), ("curve", {}), ("machine", []), ("machine", {}), ("lr", None)]
    for change in odd:
        (tmp_path / "out.json").write_text(json.dumps({**content, "runs": {key: {**run, **dict([change])}}}))
        with pytest.raises(UserError, match="does not hold results of this tool"):
            start(tool, tmp_path, "--report")


@pytest.mark.parametrize(("name", "content"), [("meta.json", "{}"), ("metrics.jsonl", '{"step": 1, "loss": 1.0}\n')])
def test_the_numbers_of_a_damaged_run_are_not_taken(tmp_path: Path, tool: ModuleType, name: str, content: str) -> None:
    """Of a run that was found finished, by the name of its folder."""
    start(tool, tmp_path, sweep="none", seeds=1, best={"methods": 0})
    (folder, *_) = (path for path in (tmp_path / "work").iterdir() if path.is_dir())
    (folder / name).write_text(content)
    with pytest.raises(UserError, match="is damaged, so the run's numbers are lost: move the folder away"):
        read_run(folder, diverged=False)
