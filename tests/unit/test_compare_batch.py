"""tools/compare.py --batch without training: time limit, failures, inputs that travel, one device per table."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

import megatron_switchlora.study.comparison.inputs as inputs
from megatron_switchlora.config.errors import UserError
from megatron_switchlora.study.comparison import command
from megatron_switchlora.study.comparison.batch import BatchRunner, environment_of, require_batch, run_batch
from megatron_switchlora.study.comparison.inputs import Inputs, open_inputs, pack
from megatron_switchlora.study.comparison.results import Results
from megatron_switchlora.study.comparison.settings import Setting, read_setting, validate_points
from megatron_switchlora.study.comparison.workers import Ended

SETTING: dict[str, Any] = {
    "options": {"model.hidden_size": 32, "train.steps": 20, "train.warmup_steps": 2, "method.rank": 4,
                "data.source": "files", "data.files": "{data}/*.txt", "data.tokenizer": "char"},
    "sweep": "none", "seeds": 3, "best": {"methods": 0},
    "methods": {name: {"options": {"method.name": name}, "lr": 0.02} for name in ("full", "lora")},
}  # fmt: skip


def figures(**changes: Any) -> dict[str, Any]:
    """Return what a worker answers, of 20 steps in 8 seconds of 10."""
    run = {"val_loss": 2.0, "diverged": False, "steps": 20, "curve": [[20, 640, 2.0]], "seconds": 8.0, "wall": 10.0}
    run |= {"peak_memory_bytes": None, "dp_bytes": 0, "device": "GPU 1", "trainable": 50, "full_rank": 100}
    run |= {"vocab_size": 300, "revision": None, "data": "text", "machine": dict.fromkeys(("cpus", "processor"), 1)}
    run["machine"]["system"] = "Linux"
    return run | changes


@dataclass
class Bench:
    """Workers that move a clock instead of training: each run takes `seconds`, or what is given for it."""

    seconds: float = 10.0
    special: dict[str, Any] = field(default_factory=dict)  # by a part of the run's folder
    now: float = 0.0
    begun: list[str] = field(default_factory=list)
    made: int = 0

    def make(self, requested: str, log: Path, environment: dict[str, str]) -> FakeWorker:
        self.made += 1
        return FakeWorker(self)


class FakeWorker:
    def __init__(self, bench: Bench) -> None:
        self.bench, self.alive = bench, True

    def device(self, seconds: float) -> str:
        return "GPU 1"

    def train(self, task: dict[str, Any], seconds: float) -> dict[str, Any]:
        name = Path(task["folder"]).name
        self.bench.begun.append(name)
        what = next((value for part, value in self.bench.special.items() if part in name), self.bench.seconds)
        if isinstance(what, str):
            self.alive = False
            raise Ended(what)
        if isinstance(what, dict):
            return what
        self.bench.now += min(what, seconds)
        if what > seconds:
            self.end()
            raise TimeoutError
        return figures(wall=what, seconds=0.8 * what)

    def end(self) -> None:
        self.alive = False


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    (tmp_path / "short.yaml").write_text(yaml.safe_dump(SETTING))
    return read_setting(tmp_path / "short.yaml", None, {})


def start(setting: Setting, folder: Path, bench: Bench, limit: float = 1000.0) -> tuple[int, BatchRunner]:
    """Run a batch; its exit status, and the runner with the results."""
    runner = BatchRunner(
        setting, Results(folder / "found.json"), folder / "work", Inputs(folder, "text", "abc"), folder, "auto", 1,
        limit, bench.make, lambda: bench.now,  # type: ignore[arg-type]
    )  # fmt: skip
    return run_batch(runner, Results(folder / "known.json")), runner


def on_disk(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "found.json").read_text())["runs"]


def test_a_run_that_does_not_fit_is_not_begun(
    setting: Setting, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = Bench()
    status, runner = start(setting, tmp_path, bench, limit=35.0)
    assert status == 75 and len(bench.begun) == len(on_disk(tmp_path)) == 3 and bench.now == 30.0
    # whose seeds follow a left-out run are asked for only where their thread comes first
    assert 2 <= len(runner.left_out) <= 3 and "it takes about 10 s and 5 s are left" in capsys.readouterr().out
    status, runner = start(setting, tmp_path, bench)  # the rest, later
    assert status == 0 and len(bench.begun) == len(set(bench.begun)) == len(on_disk(tmp_path)) == 6
    assert {run["revision"] for run in on_disk(tmp_path).values()} == {"abc"} and not runner.left_out


def test_longer_runs_of_a_method_are_expected_to_take_longer(setting: Setting, tmp_path: Path) -> None:
    _, runner = start(setting, tmp_path, Bench())
    assert runner.expected("lora", 20) == pytest.approx(10) and runner.expected("lora", 200) == pytest.approx(82)
    assert runner.expected("another", 20) == pytest.approx(10)


def test_a_run_that_is_late_is_ended_without_a_result(setting: Setting, tmp_path: Path) -> None:
    bench = Bench(special={"lora": 50.0})
    status, _ = start(setting, tmp_path, bench, limit=45.0)
    assert status == 75 and bench.now == 45.0
    assert len(on_disk(tmp_path)) < len(bench.begun) and {run["method"] for run in on_disk(tmp_path).values()} <= {
        "full"
    }


@pytest.mark.parametrize("failure", ["its process ended", {"failed": "out of memory"}])
def test_a_run_that_fails_does_not_stop_other_methods(setting: Setting, tmp_path: Path, failure: Any) -> None:
    bench = Bench(special={"lora_lr_0.02_seed_1": failure})
    status, runner = start(setting, tmp_path, bench)
    assert status == 2 and list(runner.failures) == [key for key in runner.failures if "lora lr 0.02 seed 1" in key]
    assert len(on_disk(tmp_path)) == 5
    assert bench.made == (2 if isinstance(failure, str) else 1), "who has ended has a successor"


def test_results_are_on_the_disk_after_each_run(setting: Setting, tmp_path: Path) -> None:
    seen: list[int] = []

    class Looking(Bench):
        def make(self, *_: Any) -> FakeWorker:
            class Worker(FakeWorker):
                def train(self, task: dict[str, Any], seconds: float) -> dict[str, Any]:
                    seen.append(len(on_disk(tmp_path)))
                    return super().train(task, seconds)

            return Worker(self)

    start(setting, tmp_path, Looking())
    assert seen == [0, 1, 2, 3, 4, 5]


def test_known_runs_count_on_their_device_alone(
    setting: Setting, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = Bench()
    start(setting, tmp_path, bench)
    (tmp_path / "found.json").rename(tmp_path / "known.json")
    start(setting, tmp_path, bench)
    assert len(bench.begun) == 6 and len(on_disk(tmp_path)) == 6
    content = (tmp_path / "known.json").read_text().replace("GPU 1", "cpu")
    (tmp_path / "known.json").write_text(content)
    (tmp_path / "found.json").unlink()
    start(setting, tmp_path, bench)
    assert len(bench.begun) == 12 and "holds runs on cpu, which do not count on GPU 1" in capsys.readouterr().out


def test_a_table_has_runs_of_one_device(setting: Setting, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start(setting, tmp_path, Bench())
    words = [str(tmp_path / "short.yaml"), "--merge", str(tmp_path / "found.json"), "--out", str(tmp_path / "gpu.json")]
    assert command.act(command.make_parser().parse_args(words)) == 0
    merged = json.loads((tmp_path / "gpu.json").read_text())
    assert merged == json.loads((tmp_path / "found.json").read_text())
    assert "6 runs of" in capsys.readouterr().out and "on GPU 1" in (tmp_path / "gpu.md").read_text()
    on_cpu = tmp_path / "cpu.json"
    on_cpu.write_text((tmp_path / "gpu.json").read_text().replace("GPU 1", "cpu"))
    before = on_cpu.read_text()
    words[-1] = str(on_cpu)
    refusal = r"found\.json was computed on GPU 1, the results in .*cpu\.json on cpu, .*: give another --out"
    with pytest.raises(UserError, match=refusal):
        command.act(command.make_parser().parse_args(words))
    results = Results(on_cpu)
    with pytest.raises(UserError, match="one device"):
        results.add("new", figures())
    with pytest.raises(UserError, match="one device"):
        results.add_timing("full", {"device": "GPU 1"})
    assert on_cpu.read_text() == before
    runs = {"first": next(iter(merged["runs"].values())), **json.loads(before)["runs"]}
    on_cpu.write_text(json.dumps({**merged, "runs": runs}))
    with pytest.raises(UserError, match="holds results on GPU 1 and cpu, but a table compares those of one device"):
        Results(on_cpu)


def test_step_times_without_a_device_are_of_a_cpu(tmp_path: Path) -> None:
    entry = {"ratio": 1.0, "lowest": 1.0, "highest": 1.0, "machine": figures()["machine"]}
    (tmp_path / "old.json").write_text(json.dumps({"timing": {"full": entry}}))
    assert Results(tmp_path / "old.json").device == "cpu"


def test_several_processes_divide_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)))
    assert environment_of({"A": "b"}, 1) == {"A": "b"}
    assert environment_of({"A": "b"}, 4) == {"A": "b", "OMP_NUM_THREADS": "4"}
    assert environment_of({"OMP_NUM_THREADS": "3"}, 4) == {"OMP_NUM_THREADS": "3"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"world": 2, "launcher": "mpirun -n 2 {python} {script}"}, r"those of lora have 2 ranks: leave it out"),
        ({"options": {"train.device": "cpu"}}, r"one train\.device, but the methods have .*'lora': 'cpu'"),
        ({"options": {"data.add_bos": True}}, r"options data\.\* of lora and full differ"),
    ],
)
def test_what_no_batch_can_run_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    methods = {**SETTING["methods"], "lora": {"lr": 0.1, **changes}}
    options = {**SETTING["options"], "train.global_batch_size": 16}
    (tmp_path / "short.yaml").write_text(yaml.safe_dump({**SETTING, "options": options, "methods": methods}))
    setting = read_setting(tmp_path / "short.yaml", None, {})
    with pytest.raises(UserError, match=message):
        require_batch(setting, validate_points(setting, tmp_path))
    alone = read_setting(tmp_path / "short.yaml", ["full"], {})
    require_batch(alone, validate_points(alone, tmp_path))


def test_inputs_travel_without_the_text(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("some words of a text\n" * 200)
    words = [str(tmp_path / "short.yaml"), "--data", str(tmp_path / "text"), "--pack", str(tmp_path / "packed")]
    assert command.act(command.make_parser().parse_args(words)) == 0
    told = capsys.readouterr().out
    assert "0.0 MiB" in told and f"{tmp_path}/packed/short.yaml --inputs {tmp_path}/packed --batch OUT.json" in told
    shutil.rmtree(tmp_path / "text")
    shutil.rmtree(tmp_path / "cache")
    there = shutil.copytree(tmp_path / "packed", tmp_path / "there", copy_function=shutil.copy)  # with other times
    carried = read_setting(there / "short.yaml", None, {})
    config = validate_points(carried, there)["full"]
    found = open_inputs(there, carried, config)
    assert found.cache == there / "cache" and found.text == inputs.fingerprint(tmp_path / "packed" / "cache")
    another = read_setting(there / "short.yaml", None, {}, {"data.add_bos": True})
    with pytest.raises(UserError, match=r"packed for another text than the setting's .*add_bos.* pack it again"):
        open_inputs(there, another, config)
    with monkeypatch.context() as patch:
        patch.setattr(inputs, "code_digest", lambda config: "other")
        with pytest.raises(UserError, match="this code has other: carry the same code"):
            open_inputs(there, carried, config)
    tokens = there / "cache" / "train.npy"
    tokens.write_bytes(tokens.read_bytes()[:-2] + b"\xff\xff")
    with pytest.raises(UserError, match=r"are damaged \(the content of train\.npy has changed"):
        open_inputs(there, carried, config)
    with pytest.raises(UserError, match="holds no inputs"):
        open_inputs(tmp_path, carried, config)


def test_inputs_have_a_largest_size_and_replace_nothing_else(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "a.txt").write_text("some words of a text\n" * 200)
    config, source = validate_points(setting, tmp_path)["full"], tmp_path / "short.yaml"
    size = pack(setting, source, config, tmp_path / "packed")
    assert size == sum(path.stat().st_size for path in (tmp_path / "packed").rglob("*") if path.is_file())
    monkeypatch.setattr(inputs, "LARGEST", size)
    pack(setting, source, config, tmp_path / "packed")  # as large as it may be, over an earlier one
    monkeypatch.setattr(inputs, "LARGEST", size - 1)
    with pytest.raises(UserError, match=r"Inputs may have 0 MiB, but .* have 0\.0 MiB: give fewer files"):
        pack(setting, source, config, tmp_path / "again")
    assert not (tmp_path / "again").exists() and inputs.LARGEST < 64 << 20
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="holds no earlier inputs, so it is not replaced"):
        pack(setting, source, config, tmp_path / "mine")


def test_a_batch_removes_what_a_batch_has_made_alone(setting: Setting, tmp_path: Path) -> None:
    work = tmp_path / "work"
    (work / "thesis").mkdir(parents=True)
    kept = [work / "thesis" / "data.txt", work / "out.json", work / "mine_seed_1_0123abcd"]
    for path in kept:
        path.write_text("mine")
    bench = Bench()
    start(setting, tmp_path, bench, limit=15.0)
    own = work / bench.begun[0]  # a killed call leaves its run and its log
    own.mkdir()
    (own / "part").touch()
    (work / "worker0.log").touch()
    with (work / ".batch").open("a") as file:
        file.write("thesis\n../found.json\n")
    status, _ = start(setting, tmp_path, Bench())
    assert status == 0 and not own.exists() and not (work / "worker0.log").exists()
    assert [path.read_text() for path in kept] == ["mine"] * 3 and on_disk(tmp_path)


def test_a_folder_in_the_place_of_a_run_is_kept(setting: Setting, tmp_path: Path) -> None:
    bench = Bench()
    start(setting, tmp_path, bench)
    (tmp_path / "found.json").unlink()
    shutil.rmtree(tmp_path / "work")
    mine = tmp_path / "work" / bench.begun[-1]
    mine.mkdir(parents=True)
    status, runner = start(setting, tmp_path, Bench())
    assert status == 2 and mine.is_dir() and len(on_disk(tmp_path)) == 5
    assert f"{mine} is there, and was not made by this batch: move it away" in next(iter(runner.failures.values()))


def test_merging_keeps_the_rates_that_are_there(tmp_path: Path) -> None:
    def results(name: str, **chosen: Any) -> Results:
        content = {"data": "text", "chosen": chosen, "timing": {}, "runs": {}}
        (tmp_path / name).write_text(json.dumps(content))
        return Results(tmp_path / name)

    ours = results("ours.json", full=[0.1, None], lora=None)
    assert ours.merge(results("theirs.json", full=[0.2, None], lora=[0.3, None], lte=None)) == 0
    assert Results(ours.path).content["chosen"] == {"full": [0.1, None], "lora": [0.3, None]}
