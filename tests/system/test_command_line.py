"""The main job as users type it: under deepspeed, torchrun, mpirun, srun and alone; what it leaves; what it refuses."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Optional

import pytest
import torch
import transformers
from huggingface_hub import ModelCard

from megatron_switchlora.config.command_line import parse_arguments
from megatron_switchlora.config.ds_config import Zero
from megatron_switchlora.data.loader import eval_batches
from megatron_switchlora.data.packing import open_prepared
from megatron_switchlora.planning.traffic import gradient_bytes
from tests.dist.launch import REPOSITORY, free_port
from tests.system.commands import BIN, EVALUATED, Place

ZERO1 = ["--ds_config", str(REPOSITORY / "ds_configs" / "zero1.json")]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    found = Place(tmp_path_factory.mktemp("system"))
    (found.corpus / "empty.txt").touch()
    return found


@pytest.fixture(scope="module")
def finished(place: Place) -> str:
    """A finished run under the deepspeed launcher; returns its output."""
    status, output = place.run("deepspeed", place.options("run", *ZERO1))
    assert status == 0, output
    return output


def test_terminal_output(place: Place, finished: str) -> None:
    assert finished.count("step     12/12  loss") == 1
    for words in ("Trained a LLaMA", "Validation perplexity", "tokens per second", "Trainable:", "Gradient bytes",
                  "Run folder:", "switchlora generate"):  # fmt: skip
        assert finished.count(words) == 1, words
    assert finished.count(f"warning: Documents without text, left out: 1 ({place.corpus}/empty.txt).") == 1
    assert "Traceback" not in finished


def test_run_folder(place: Place, finished: str) -> None:
    run = place.folder / "run"
    names = {path.name for path in run.iterdir()}
    assert names == {"config.yaml", "ds_config.json", "metrics.jsonl", "meta.json", "loss.png", "tokenizer", "final",
                     "checkpoints", ".lock"}  # fmt: skip
    assert (run / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    meta = json.loads((run / "meta.json").read_text())
    assert meta["finished"] and meta["mesh"] == {"lte": 1, "dp": 2, "tp": 1}
    assert meta["versions"]["deepspeed"] == "0.19.8"
    card = ModelCard.load(run / "final" / "README.md")
    trainable, whole = meta["parameters"]["trainable"], meta["parameters"]["full_rank"]
    for words in (f"{meta['val_loss']:.4f} nats", f"{meta['val_ppl']:.2f} |", f"{trainable:,} of {whole:,}", "# run\n"):
        assert words in card.text, card.text
    assert json.loads((run / "ds_config.json").read_text())["gradient_accumulation_steps"] == 2
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "tokenizer")
    assert tokenizer.decode(tokenizer("def f(x):\n    pass")["input_ids"]) == "def f(x):\n    pass"


def test_metrics(place: Place, finished: str) -> None:
    records = place.records("run")
    steps = [r for r in records if "loss" in r]
    evaluations = [r for r in records if "val_loss" in r]
    assert [r["step"] for r in steps] == list(range(1, 13))
    assert [r["step"] for r in evaluations] == [0, 6, 12]
    assert records[0] == evaluations[0]
    for record in steps:
        assert set(record) == {"step", "loss", "lr", "grad_norm", "tokens", "seconds", "tokens_per_second",
                               "peak_memory_bytes", "dp_bytes", "switched"}  # fmt: skip
        assert record["tokens"] == record["step"] * 8 * 32
    meta = json.loads((place.folder / "run" / "meta.json").read_text())
    config = parse_arguments(["--config", str(place.folder / "run" / "config.yaml")]).config
    padded = gradient_bytes(config, meta["vocab_size"], 1, 2, Zero(1))[0]
    assert steps[0]["dp_bytes"] == padded > 4 * meta["parameters"]["trainable"]
    assert sum(r["switched"] for r in steps) > 20
    assert evaluations[-1]["val_loss"] < evaluations[0]["val_loss"] - 0.3
    assert evaluations[-1]["val_ppl"] == pytest.approx(math.exp(evaluations[-1]["val_loss"]))


def test_final_model_in_transformers_has_the_same_validation_loss(place: Place, finished: str) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(place.folder / "run" / "final")
    (cache,) = [p for p in (place.folder / "cache" / "megatron_switchlora").iterdir() if not p.name.startswith(".")]
    total, count = 0.0, 0
    for tokens in eval_batches(open_prepared(cache).val.samples(32), 8, 0, 1, EVALUATED):
        with torch.no_grad():
            logits = model(tokens[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
        total, count = total + loss.item(), count + tokens[:, 1:].numel()
    recorded = [r for r in place.records("run") if "val_loss" in r][-1]["val_loss"]
    print(f"\ntransformers {total / count:.8f}, recorded {recorded:.8f}")
    assert total / count == pytest.approx(recorded, abs=1e-5)


@pytest.mark.parametrize("launcher", ["python", pytest.param("torchrun", marks=pytest.mark.full)])
def test_evaluate_only_repeats_the_number(place: Place, finished: str, launcher: str) -> None:
    arguments = ["--evaluate_only", "--output_dir", str(place.folder / "run")]
    if launcher == "python":
        arguments += ["--train.threads", "1"]
    status, output = place.run(launcher, arguments)
    assert status == 0, output
    recorded = [r for r in place.records("run") if "val_loss" in r][-1]["val_loss"]
    (said,) = [line for line in output.splitlines() if "validation loss" in line]
    assert float(said.split("validation loss ")[1].split(",")[0]) == pytest.approx(recorded, abs=1e-5)


def srun_variables(rank: int) -> dict[str, str]:
    """What srun -n 2 sets on one node, of what matters here; the job number makes the port this test's own."""
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "node[07]"}
    tasks = {"SLURM_NTASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_NODEID": "0"}
    return {**job, **tasks, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}


@pytest.mark.parametrize(
    "launcher", ["mpirun", *(pytest.param(name, marks=pytest.mark.full) for name in ("python", "torchrun", "srun"))]
)
def test_other_launchers_train_the_same(place: Place, finished: str, launcher: str) -> None:
    """One process, and two under other launchers, see the same batches and switches as deepspeed's two."""
    run = f"run_{launcher}"
    arguments = place.options(run, "--optim.lr", "0.01")
    if launcher == "srun":
        statuses, output = place.run_each(arguments, [srun_variables(0), srun_variables(1)], timeout=120)
        assert statuses == [0, 0], output
    else:
        status, output = place.run(launcher, arguments)
        assert status == 0, output
    assert output.count("step     12/12  loss") == 1
    meta = json.loads((place.folder / run / "meta.json").read_text())
    assert meta["mesh"]["dp"] == (1 if launcher == "python" else 2)
    for mine, theirs in zip(place.records(run), place.records("run"), strict=True):
        for key in ("loss", "val_loss", "grad_norm"):
            if key in theirs:
                assert mine[key] == pytest.approx(theirs[key], rel=1e-5), (key, mine["step"])
        assert mine.get("switched") == theirs.get("switched")


def test_generate(place: Place, finished: str) -> None:
    done = place.typed("tools/generate.py", str(place.folder / "run"), "def ")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("def ") and len(done.stdout) > 20
    status, output = place.script("tools/generate.py", str(place.folder), "def ")
    assert status == 2 and "holds a model" in output, output


def test_a_used_folder_is_refused_and_untouched(place: Place, finished: str) -> None:
    before = {p: p.stat().st_mtime_ns for p in (place.folder / "run").rglob("*")}
    status, output = place.run("alone", place.options("run", *ZERO1, "--resume", "none"))
    assert status != 0
    assert output.count("already holds a run") == 1
    assert {p: p.stat().st_mtime_ns for p in (place.folder / "run").rglob("*")} == before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--method.rang", "6"], "did you mean 'method.rank'"),
        (["--data.files", "nowhere/*.txt"], "nowhere/*.txt"),
        (["--ds_config", "zero3.json"], "stage must be 0, 1 or 2"),
        (["--config", "null.yaml"], "--config null.yaml: optim.weight_decay must be a number, not null"),
        (["--ds_config", "flops.json"], "flops_profiler.output_file in the DeepSpeed JSON"),
        *(
            pytest.param(*mistake, marks=pytest.mark.full)
            for mistake in [
                (["--model.num_heads", "3"], "must be a multiple of model.num_heads 3"),
                (["--train.global_batch_size", "6"], "train.global_batch_size 6 must be a multiple of"),
                (["--data.val_fraction", "0.0001"], "validation"),
                (["--train.global_batch_size", "8192"], "8192"),
            ]
        ),
    ],
)
def test_mistakes_are_told_once_and_end_every_rank(place: Place, more: list[str], message: str) -> None:
    (place.folder / "zero3.json").write_text('{"zero_optimization": {"stage": 3}}')
    (place.folder / "flops.json").write_text('{"flops_profiler": {"enabled": true, "output_file": "flops.json/x/y"}}')
    (place.folder / "null.yaml").write_text("optim:\n  weight_decay:\n")
    run = f"refused_{abs(hash(tuple(more)))}"
    statuses, output = place.run_pair(place.options(run, *more))
    assert statuses == [2, 2]
    assert output.count("error: ") == 1, output
    assert message in output
    assert "Traceback" not in output, output
    assert not (place.folder / run).exists()


@pytest.mark.parametrize(
    ("late", "everywhere", "on_rank_1", "message"),
    [
        (True, ["--method.rang", "6"], [], "did you mean 'method.rank'"),
        *(
            pytest.param(*case, marks=pytest.mark.full)
            for case in [
                (True, [], ["--method.rang", "6"], "rank 1, on .* cannot start: .* did you mean 'method.rank'"),
                (False, [], ["--method.rank", "5"], "All ranks must run the same, but method.rank is 5 on ranks 1"),
            ]
        ),
    ],
)
def test_torchrun_lets_rank_0_speak(
    place: Place, late: bool, everywhere: list[str], on_rank_1: list[str], message: str
) -> None:
    """It ends rank 0 as soon as another rank has ended, also before rank 0 has got as far as that one's mistake."""
    program = place.folder / "late.py"
    program.write_text(
        "import os, runpy, sys, time\n"
        f"if os.environ['RANK'] == '0': time.sleep({4 * late})\n"
        f"else: sys.argv += {on_rank_1}\n"
        f"sys.argv[0] = {str(REPOSITORY / 'launch' / 'pretrain.py')!r}\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    command = [str(BIN / "torchrun"), "--nproc_per_node", "2", "--master_port", str(free_port()), str(program)]
    command += place.options("spoken", *everywhere)
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=place.env, check=False)
    output = done.stdout + done.stderr
    assert done.returncode != 0 and not (place.folder / "spoken").exists()
    assert output.count("error: ") == 1 and re.search(message, output), output


@pytest.mark.full
def test_mpirun_tells_a_mistake_once(place: Place) -> None:
    status, output = place.run("mpirun", place.options("refused_mpi", "--train.global_batch_size", "6"), timeout=60)
    assert status == 2
    assert output.count("error: ") == 1, output
    assert "must be a multiple of" in output and "x 2 data-parallel ranks" in output, output


@pytest.mark.parametrize(
    ("dropped", "told", "message"),
    [
        ("SLURM_NTASKS", 1, "found SLURM_PROCID=0, .* but not SLURM_NTASKS: start with"),
        ("SLURM_PROCID", 2, "but not SLURM_PROCID: start with"),  # nobody knows who is first
        ("SLURM_STEP_ID", 1, "found SLURM_PROCID=0, SLURM_NTASKS=2, .*: put srun before python"),
    ],
)
def test_incomplete_srun_ends_every_rank(place: Place, dropped: str, told: int, message: str) -> None:
    added = [{name: value for name, value in srun_variables(rank).items() if name != dropped} for rank in (0, 1)]
    statuses, output = place.run_each(place.options("refused_srun"), added, timeout=60)
    assert statuses == [2, 2]
    assert output.count("error: ") == told and re.search(message, output), output
    assert "Traceback" not in output, output


def test_a_rank_beyond_its_world_tells_it_itself(place: Place) -> None:
    """Rank 0 sees nothing wrong there, so it cannot tell."""
    variables = {**srun_variables(1), "SLURM_PROCID": "2"}
    statuses, output = place.run_each(place.options("beyond"), [variables], timeout=60)
    assert statuses == [2]
    assert output.count("error: Ranks must lie below their group's size, but srun gives Ranks(rank=2") == 1, output


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"MASTER_PORT": None}, "must set all of .*; found RANK=1, .* but not MASTER_PORT"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT must lie between 1 and 65535, but it is 99999"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE must be a whole number, but it is 'two'"),
    ],
)
def test_what_only_another_host_lacks_is_told_there(
    place: Place, changes: dict[str, Optional[str]], message: str
) -> None:
    """Rank 0 sees nothing wrong; of the ranks of that host the first speaks."""
    start = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "n1", "MASTER_PORT": "29500"}
    given = {name: value for name, value in (start | changes).items() if value is not None}
    ranks = [{**given, "RANK": str(1 + local), "LOCAL_RANK": str(local)} for local in (0, 1)]
    statuses, output = place.run_each(place.options("elsewhere"), ranks, timeout=60)
    assert statuses == [2, 2]
    assert output.count("error: on ") == output.count("error: ") == 1 and re.search(message, output), output


def test_ranks_of_mpirun_agree_on_a_port_below_a_shell(place: Place, tmp_path: Path) -> None:
    """The processes' parents differ there; two starts at a time get two ports."""
    code = (
        "import os, sys; from megatron_switchlora.startup.environment import complete_environment as c; "
        "e = os.environ; c(e); print(e['MASTER_ADDR'], e['MASTER_PORT'], file=open(sys.argv[1] + e['RANK'], 'w'))"
    )
    said = []
    for start in "ab":  # files, since mpirun may mix the ranks' lines
        shell = '"$0" -c "$1" "$2"; exit $?'
        command = [str(BIN / "mpirun"), "-n", "2", "sh", "-c", shell, sys.executable, code, str(tmp_path / start)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=place.env, check=False)
        assert done.returncode == 0, done.stderr
        said.append([(tmp_path / f"{start}{rank}").read_text().split() for rank in range(2)])
    assert all(zero == one for zero, one in said)
    assert said[0][0][1] != said[1][0][1]


def test_a_run_that_blows_up_names_step_and_layer(place: Place) -> None:
    more = ["--optim.lr", "1e20", "--optim.clip", "0", "--train.warmup_steps", "0", "--method.name", "full"]
    status, output = place.run("alone", place.options("blown", *more))
    assert status != 0
    assert output.count("error: ") == 1, output
    assert "Step 2 gave loss" in output and "first bad on rank 0: the output of model.layers.0" in output, output


@pytest.mark.full
def test_a_run_whose_last_update_destroys_the_model_fails(place: Place) -> None:
    more = ["--train.steps", "1", "--train.warmup_steps", "0", "--optim.lr", "1e30", "--optim.clip", "0"]
    status, output = place.run("alone", place.options("destroyed", *more))
    assert status == 2
    assert "The validation loss after step 1 is" in output
    assert not (place.folder / "destroyed" / "final").exists()
    assert "NaN" not in (place.folder / "destroyed" / "metrics.jsonl").read_text()


def test_evaluating_on_a_changed_corpus_is_refused(place: Place, finished: str) -> None:
    changed = place.corpus / "textwrap.txt"
    before, times = changed.read_text(), (changed.stat().st_atime_ns, changed.stat().st_mtime_ns)
    try:
        changed.write_text(before + "# one more line\n")
        status, output = place.run("alone", ["--evaluate_only", "--output_dir", str(place.folder / "run")])
        assert status == 2 and "has changed since" in output, output
    finally:
        changed.write_text(before)
        os.utime(changed, ns=times)


@pytest.mark.full
def test_print_config_and_help_appear_once(place: Place) -> None:
    for launcher in ("torchrun", "mpirun"):
        status, output = place.run(launcher, ["--print_config", "--method.rank", "11"])
        assert status == 0
        assert output.count("rank: 11") == 1
    assert place.run("alone", ["--help"])[1].count("--optim.dense_lr") == 1
    assert place.run("alone", ["--help", "all"])[1].count("--optim.dense_lr") == 2  # usage line and help


@pytest.mark.full
def test_end_of_data(place: Place) -> None:
    """train.epochs ends the run in plain words."""
    (place.folder / "zero0.json").write_text('{"zero_optimization": {"stage": 0}}')
    more = ["--ds_config", "zero0.json", "--train.epochs", "1", "--train.steps", "5000", "--method.name", "lora"]
    more += ["--train.global_batch_size", "128", "--train.eval_interval", "1000"]
    status, output = place.run("alone", place.options("short", *more))
    assert status == 0, output
    last = [r for r in place.records("short") if "loss" in r][-1]["step"]
    assert f"the data ends after {last} of 5000 steps (train.epochs 1)" in output


def test_bf16_run(place: Place) -> None:
    """bf16 through the trainer: exported model and recorded loss agree to bf16's precision."""
    ds = str(REPOSITORY / "ds_configs" / "zero1_fp32_accum.json")
    status, output = place.run("alone", place.options("bf16", "--train.precision", "bf16", "--ds_config", ds))
    assert status == 0, output
    fp32 = place.records("run")[-1]["val_loss"] if (place.folder / "run").exists() else None
    mine = place.records("bf16")[-1]["val_loss"]
    if fp32 is not None:
        assert mine == pytest.approx(fp32, rel=0.01)
    state = transformers.AutoModelForCausalLM.from_pretrained(place.folder / "bf16" / "final").state_dict()
    assert all(torch.isfinite(tensor).all() for tensor in state.values())
    assert Path(place.folder / "bf16" / "loss.png").exists()
