"""Runs that are stopped, killed, damaged or out of disk, and what the same command line makes of them."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from megatron_switchlora.checkpoint.files import published
from tests.dist.launch import end
from tests.system.commands import Place
from tests.system.soak import comparable, soak
from tests.system.test_signals import wait_for_steps, wait_until_gone, worker_pids

REQUEUE = 75
SAVING = ["--checkpoint.interval", "4", "--train.steps", "40", "--train.eval_interval", "10"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """With a run of one process left alone, `whole`."""
    place = Place(tmp_path_factory.mktemp("resume"))
    status, output = place.run("alone", place.options("whole", *SAVING))
    assert status == 0, output
    return place


def steps_of(place: Place, run: str) -> list[int]:
    return [int(path.name[5:]) for path in published(place.folder / run / "checkpoints")]


def same_records(place: Place, run: str, other: str) -> bool:
    return comparable(place.records(run)) == comparable(place.records(other))


def test_a_finished_run_is_left_alone(place: Place) -> None:
    before = (place.folder / "whole" / "metrics.jsonl").read_bytes()
    status, output = place.run("alone", place.options("whole", *SAVING))
    assert status == 0 and "is finished: give another --output_dir" in output
    assert (place.folder / "whole" / "metrics.jsonl").read_bytes() == before
    assert steps_of(place, "whole") == [36, 40]


@pytest.mark.full
def test_stop_after_steps_and_seconds(place: Place) -> None:
    options = [*place.options("stopped", *SAVING), "--checkpoint.interval", "0"]
    status, output = place.run("alone", [*options, "--train.stop_after_steps", "7"])
    assert status == REQUEUE and "stopped after step 7 as asked" in output and steps_of(place, "stopped") == [7]
    status, output = place.run("alone", [*options, "--train.stop_after_seconds", "0.01"])
    assert status == REQUEUE and "resumes after step 7 " in output and "stopped after step 8" in output
    status, output = place.run("alone", options)
    assert status == 0 and "resumes after step 8 " in output
    assert same_records(place, "stopped", "whole")
    ours, theirs = (load_file(place.folder / run / "final" / "model.safetensors") for run in ("stopped", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.full)])
def test_a_signal_to_one_rank_ends_all_with_a_checkpoint(place: Place, number: int) -> None:
    run = f"asked{int(number)}"
    process = place.start("torchrun", place.options(run, *SAVING, "--train.steps", "100000"))
    try:
        wait_for_steps(process)
        workers = worker_pids(process.pid)
        os.kill(workers[1], number)  # the ranks agree on the step
        output, _ = process.communicate(timeout=60)
    finally:
        end([process])
    assert process.returncode != 0 and output.count("exitcode  : 75") >= 1, output
    (line,) = [line for line in output.splitlines() if line.startswith("stopped after step")]
    step = int(line.split()[3])
    assert steps_of(place, run)[-1] == step == place.records(run)[-1]["step"]


@pytest.mark.full
def test_sigterm_under_the_deepspeed_launcher_leaves_a_checkpoint(place: Place) -> None:
    """To the process group, as schedulers send it: DeepSpeed's front end alone passes no signal on."""
    process = place.start("deepspeed", place.options("launcher", *SAVING, "--train.steps", "100000"))
    try:
        wait_for_steps(process)
        everyone = worker_pids(process.pid)
        os.killpg(process.pid, signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
        assert wait_until_gone(everyone, 10) == []
    finally:
        end([process])
    assert process.returncode != 0 and output.count("stopped after step") == 1, output
    assert steps_of(place, "launcher")[-1] == place.records("launcher")[-1]["step"]


@pytest.mark.parametrize(
    ("launcher", "tp"),
    [
        ("alone", "1"),
        pytest.param("torchrun 4", "2", marks=pytest.mark.full),  # dp 2 x tp 2, which implies dp 2
        pytest.param("torchrun", "1", marks=pytest.mark.long),
    ],
)
def test_kill_9_and_the_same_command_again(place: Place, launcher: str, tp: str) -> None:
    """What is killed, users' own launcher has started; where the start is not the matter, ranks are forked."""
    name = f"{launcher}-{tp}".replace(" ", "")
    forked = {"torchrun 4": "4 ranks", "torchrun": "2 ranks"}.get(launcher, launcher)
    options = [*SAVING, "--parallel.tp", tp]
    whole = "whole" if launcher == "alone" else f"{name}-whole"
    if launcher != "alone":
        status, output = place.run(forked, place.options(whole, *options))
        assert status == 0, output
    line = place.options(f"{name}-killed", *options)
    process = place.start(launcher, line)
    try:
        wait_for_steps(process)
        for pid in worker_pids(process.pid) or [process.pid]:  # alone, it is the only process
            os.kill(pid, signal.SIGKILL)
        process.communicate(timeout=60)
    finally:
        end([process])
    left = steps_of(place, f"{name}-killed")
    status, output = place.run(forked, line)
    assert status == 0 and (not left or f"resumes after step {left[-1]} " in output), output
    assert same_records(place, f"{name}-killed", whole)


def test_damage_is_found_before_training_and_named(place: Place) -> None:
    shutil.copytree(place.folder / "whole", place.folder / "damaged")
    run = place.folder / "damaged"
    meta = json.loads((run / "meta.json").read_text())
    (run / "meta.json").write_text(json.dumps({**meta, "finished": False}))
    newest = run / "checkpoints" / "step-00000040" / "tensors-00000.safetensors"
    good = newest.read_bytes()
    newest.write_bytes(good[:-9] + bytes([good[-9] ^ 4]) + good[-8:])
    before = (run / "metrics.jsonl").read_bytes()
    statuses, output = place.run_pair(place.options("damaged", *SAVING))
    assert statuses == [2, 2] and output.count("error: ") == 1, output
    assert "tensors-00000.safetensors is damaged" in output and "move it away to resume from step-00000036" in output
    assert (run / "metrics.jsonl").read_bytes() == before
    shutil.move(newest.parent, place.folder / "moved")
    statuses, output = place.run_pair(place.options("damaged", *SAVING))
    assert statuses == [0, 0] and "resumes after step 36 " in output, output
    worst = 0.0  # two ranks went on where one had stopped
    for mine, theirs in zip(place.records("damaged"), place.records("whole"), strict=True):
        worst = max(worst, *(abs(mine[key] / theirs[key] - 1) for key in {"loss", "val_loss"} & set(theirs)))
    assert worst < 1e-5


@pytest.mark.full
def test_another_model_or_tokenizer_is_refused(place: Place) -> None:
    source = str(place.folder / "whole")
    for changes, message in [
        (["--model.hidden_size", "64"], "model.hidden_size is 32 there and 64 here"),
        (["--method.name", "lora"], "method.name is 'switchlora' there and 'lora' here"),
        (["--data.vocab_size", "320"], "vocab_size is 300 there and 320 here"),
    ]:
        status, output = place.run("alone", [*place.options("other", *SAVING), *changes, "--resume", source])
        assert status == 2 and message in output, output
    assert not (place.folder / "other" / "checkpoints").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1.6 MB: the run's files and two checkpoints fit, a third does not."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1600k", "tmpfs", str(folder)], capture_output=True)
    if made.returncode:
        pytest.skip(f"needs root to mount a small file system: {made.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.full
def test_a_full_disk_keeps_the_run_and_the_last_checkpoint(place: Place, small_disk: Path) -> None:
    options = [*place.options("unused")[:-2], "--output_dir", str(small_disk / "run"), *SAVING]
    process = place.start("alone", [*options, "--checkpoint.keep_last", "9", "--train.stop_after_steps", "30"])
    try:
        output, _ = process.communicate(timeout=120)
    finally:
        end([process])
    assert process.returncode == REQUEUE, output
    assert "was not written (rank 0:" in output and "Training continues." in output, output
    kept = published(small_disk / "run" / "checkpoints")
    assert kept and not list((small_disk / "run" / "checkpoints").glob(".building*"))
    shutil.copytree(small_disk / "run", place.folder / "rescued")
    status, output = place.run("alone", place.options("rescued", *SAVING))
    assert status == 0 and f"resumes after step {int(kept[-1].name[5:])} " in output, output
    assert same_records(place, "rescued", "whole")


@pytest.mark.parametrize(
    ("interval", "replaced"),
    [
        pytest.param("4", False, marks=pytest.mark.full),
        pytest.param("0", True, marks=pytest.mark.full),
        pytest.param("4", True, marks=pytest.mark.long),
        pytest.param("0", False, marks=pytest.mark.long),
    ],
)
def test_a_vanished_folder_ends_the_run(place: Place, interval: str, replaced: bool) -> None:
    """Also when another one has its name by then, where all could be written; at the end or at a save before."""
    name = f"vanishing{interval}{replaced}"
    options = ["--checkpoint.interval", interval, "--train.steps", "200", "--train.eval_interval", "200"]
    process = place.start("alone", place.options(name, *options))
    try:
        wait_for_steps(process)
        (place.folder / name).rename(place.folder / f"{name} away")
        if replaced:
            (place.folder / name).mkdir()
        output, _ = process.communicate(timeout=120)
    finally:
        end([process])
    assert process.returncode == 2 and "has vanished" in output, output
    assert replaced or not (place.folder / name).exists()
    if interval == "0":
        assert f"the final model cannot be written to {place.folder / name / 'final'} and the run stops" in output


def unfinished(place: Place, name: str) -> Path:
    """A copy of `whole` as if it had been killed before its export."""
    run = place.folder / name
    shutil.copytree(place.folder / "whole", run)
    (run / "meta.json").write_text(json.dumps({**json.loads((run / "meta.json").read_text()), "finished": False}))
    shutil.rmtree(run / "final")
    return run


def test_damaged_records_and_strays_cost_nothing_else(place: Place) -> None:
    """A bad byte amid the records, lines of other types, and a stray in checkpoints/: told, set aside, gone on with, to
    the same end."""
    run = unfinished(place, "$5_b_$6")
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    bad = [b"\xff" + lines[3][1:], b'{"step": 7, "loss": "nan"}\n']
    (run / "metrics.jsonl").write_bytes(b"".join([*lines[:3], *bad, *lines[4:]]))
    (run / "checkpoints" / "step-00000099").mkdir()
    statuses, output = place.run_pair(place.options(run.name, *SAVING))
    assert statuses == [0, 0] and "step-00000099 was ignored" in output, output
    assert output.count("metrics.jsonl: 2 damaged or repeated line(s) moved to metrics.dropped.jsonl\n") == 1
    assert output.count("metrics.jsonl has no record of 1 of the 40 earlier steps\n") == 1
    assert (run / "metrics.jsonl").read_bytes().splitlines(True) == [*lines[:3], *lines[4:]]
    assert (run / "metrics.dropped.jsonl").read_bytes() == b"".join(bad)
    ours, theirs = (load_file(place.folder / name / "final" / "model.safetensors") for name in (run.name, "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert json.loads((run / "meta.json").read_text())["finished"] and (run / "loss.png").exists()


def test_a_run_without_its_records_ends_by_its_own_evaluation(place: Place) -> None:
    run = unfinished(place, "unrecorded")
    (run / "metrics.jsonl").unlink()
    status, output = place.run("alone", place.options("unrecorded", *SAVING))
    assert status == 0 and "metrics.jsonl was missing: it starts again after step 40" in output, output
    assert "Trained a LLaMA" in output and "warning" not in output
    found, wanted = (json.loads((place.folder / name / "meta.json").read_text()) for name in (run.name, "whole"))
    assert (found["val_loss"], found["steps"]) == (wanted["val_loss"], wanted["steps"])


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("meta.json", b'{"data": [3]}', "meta.json is damaged: restore it"),
        (
            "final/model.safetensors",
            b"\xff" * 50,
            "final/model.safetensors cannot be read (Error while deserializing header",
        ),
    ],
    ids=["metadata", "weights"],
)
def test_damage_is_told_at_evaluation(place: Place, file: str, content: bytes, message: str) -> None:
    run = place.folder / "evaluated"
    shutil.copytree(place.folder / "whole", run)
    (run / file).write_bytes(content)
    statuses, output = place.run_pair(["--evaluate_only", "--output_dir", str(run), "--train.device", "cpu"])
    shutil.rmtree(run)
    assert statuses == [2, 2] and output.count("error: ") == 1 and message in output, output


def test_a_name_that_is_not_utf8_is_one_sentence(place: Place) -> None:
    for words in (place.options("caf\udce9"), ["--resume", "caf\udce9"]):
        status, output = place.run("alone", words)
        assert status == 2 and "on the command line is not UTF-8: give" in output and output.count("\n") == 1, output
    for tool, words in (("analyze", ["caf\udce9"]), ("convert_hf", ["export", "whole", "caf\udce9"])):
        status, output = place.script(f"tools/{tool}.py", *words)
        assert status == 2 and "on the command line is not UTF-8: give" in output and output.count("\n") == 1, output


def test_too_few_open_files_are_told(place: Place) -> None:
    done = subprocess.run(
        ["bash", "-c", 'ulimit -n 40; exec "$@"', "bash", *place.command("alone", place.options("few"))],
        env=place.env, cwd=place.folder, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.count("error: ") == 1, done.stderr
    assert "A process may open 40 files here, a rank needs at least 64" in done.stderr
    assert not (place.folder / "few").exists()


def convert(place: Place, *words: str) -> tuple[int, str]:
    return place.script("tools/convert_hf.py", *words)


def test_an_export_of_a_checkpoint_is_the_final_model(place: Place) -> None:
    done = place.typed("tools/convert_hf.py", "export", "whole", "exported", "--dtype", "fp32")
    assert done.returncode == 0, done.stderr
    ours, theirs = (load_file(place.folder / name / "model.safetensors") for name in ("exported", "whole/final"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    final = json.loads((place.folder / "whole" / "final" / "config.json").read_text())
    assert json.loads((place.folder / "exported" / "config.json").read_text()) == final
    status, output = convert(place, "import", "exported", "imported")
    assert status == 0 and "Start from it: switchlora pretrain --config imported/model.yaml" in output, output
    status, output = convert(place, "export", "whole", "exported")
    assert status == 2 and "exists already and is not overwritten" in output
    unfinished = place.folder / "whole" / "checkpoints" / ".building-step-00000099"
    unfinished.mkdir()
    status, output = convert(place, "export", str(unfinished), "never")
    unfinished.rmdir()
    assert status == 2 and "is an unfinished save" in output and not (place.folder / "never").exists()


@pytest.mark.full
def test_an_imported_export_starts_another_method_at_tp_2(place: Place) -> None:
    """Out to Hugging Face, in again, and on with LoRA: the first evaluation is the source's last."""
    for words in (("export", "whole", "out", "--dtype", "fp32"), ("import", "out", "start")):
        status, output = convert(place, *words)
        assert status == 0, output
    start = place.folder / "start"
    options = ["--config", str(start / "model.yaml"), "--train.init_from", str(start), "--method.name", "lora"]
    options += ["--parallel.tp", "2", "--data.tokenizer", str(start / "tokenizer"), "--train.steps", "3"]
    status, output = place.run("2 ranks", place.options("started", *options))
    assert status == 0, output
    first, last = place.records("started")[0], place.records("whole")[-1]
    assert first["val_loss"] == pytest.approx(last["val_loss"], abs=1e-5)
    status, output = convert(place, "import", "whole/final", "start")
    assert status == 2 and "exists already and is not overwritten" in output


LM_EVAL_TASK = """task: local_text
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {data}}}}}
output_type: loglikelihood_rolling
test_split: validation
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""


def test_lm_evaluation_harness_reads_an_export(place: Place) -> None:
    """Optional: on a local task, offline, its bits a byte are those of transformers' own logits."""
    lm_eval = pytest.importorskip("lm_eval", reason="optional: pip install lm-eval")
    from lm_eval.tasks import TaskManager

    folder, text = place.folder / "harness", "def parse(self, text):\n    return text"
    status, output = convert(place, "export", "whole", str(folder), "--dtype", "fp32")
    assert status == 0, output
    (folder / "data.jsonl").write_text(json.dumps({"text": text}) + "\n")
    (folder / "tasks").mkdir()
    (folder / "tasks" / "local_text.yaml").write_text(LM_EVAL_TASK.format(data=folder / "data.jsonl"))
    found = lm_eval.simple_evaluate(
        model="hf", model_args={"pretrained": str(folder), "dtype": "float32"}, tasks=["local_text"], device="cpu",
        task_manager=TaskManager(include_path=str(folder / "tasks"), include_defaults=False), bootstrap_iters=0,
    )  # fmt: skip
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokens = torch.tensor([[tokenizer.eos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]])
    assert tokens.size(1) <= 33  # one window of the model's context
    with torch.no_grad():
        logits = transformers.AutoModelForCausalLM.from_pretrained(folder)(tokens).logits
    nats = torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:], reduction="sum")
    wanted = float(nats) / len(text.encode()) / math.log(2)
    assert found["results"]["local_text"]["bits_per_byte,none"] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_short_soak(tmp_path: Path) -> None:
    place = Place(tmp_path)
    options = [*place.options("unused")[:-2], *SAVING, "--checkpoint.keep_every", "12"]
    began = time.monotonic()
    found = soak(place, 6, int(began), options)
    print(f"\n{found}")
    assert found["kills"] >= 6 and found["lost_steps"] <= 8
