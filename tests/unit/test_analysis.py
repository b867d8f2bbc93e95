"""Spectra and alignment against plain formulas; tools/analyze.py on a real run's checkpoints and on LTE's names."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_switchlora.checkpoint.archive import write_slices
from megatron_switchlora.checkpoint.files import seal
from megatron_switchlora.distributed.slices import TensorSlice
from megatron_switchlora.model.llama.model import LlamaForCausalLM
from megatron_switchlora.model.protocol import initialize_weights
from megatron_switchlora.study.analysis import command
from megatron_switchlora.study.analysis.spectra import (
    effective_rank,
    grassmann_distance,
    head_alignment,
    numerical_rank,
    spectrum,
    update_cosine,
)
from tests.numerics.lte_pairs import lte_config
from tests.plain import VOCAB, PlainRun, make_batches, small_config
from tests.unit.test_convert import save

Call = Callable[..., tuple[int, str]]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_spectrum_and_ranks_are_numpys() -> None:
    matrix = draw(7, 4) @ draw(4, 9, seed=1)
    values = spectrum(matrix)
    wanted = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    np.testing.assert_allclose(values.numpy(), wanted, rtol=1e-12, atol=1e-12)
    shares = wanted / wanted.sum()
    entropy = -sum(share * math.log(share) for share in shares if share > 0)
    assert effective_rank(values) == pytest.approx(math.exp(entropy), rel=1e-12)
    assert numerical_rank(values) == 4 == np.linalg.matrix_rank(matrix.numpy())
    assert effective_rank(torch.ones(5)) == pytest.approx(5) and effective_rank(torch.tensor([3.0, 0, 0])) == 1
    assert effective_rank(torch.zeros(3)) == 0


def test_cosine_of_updates_is_that_of_the_products() -> None:
    one, other = (draw(3, 8, seed=1), draw(3, 5, seed=2)), (draw(3, 8, seed=3), draw(3, 5, seed=4))
    products = [(B.t().double() @ A.double()).flatten() for A, B in (one, other)]
    wanted = float(torch.nn.functional.cosine_similarity(*products, dim=0))
    assert update_cosine(one, other) == pytest.approx(wanted, rel=1e-12)
    assert update_cosine(one, (-2 * one[0], one[1])) == pytest.approx(-1)
    assert update_cosine(one, (one[0], torch.zeros(3, 5))) is None


def test_grassmann_distance_is_that_of_the_principal_angles() -> None:
    angles = [0.0, 1e-9, 0.3, 1.2]  # between e_i and cos e_i + sin e_(4+i)
    first = torch.eye(8, dtype=torch.float64)[:4]
    second = torch.stack(
        [math.cos(a) * torch.eye(8)[i] + math.sin(a) * torch.eye(8)[4 + i] for i, a in enumerate(angles)]
    )
    mix = draw(4, 4).double()  # another basis of the same space
    assert grassmann_distance(first, mix @ second.double()) == pytest.approx(math.hypot(0.3, 1.2), rel=1e-6)
    assert grassmann_distance(first, mix @ first) < 1e-12
    assert grassmann_distance(first, torch.eye(8)[4:]) == pytest.approx(math.pi)  # sqrt(4) pi / 2
    one, other = draw(3, 9), draw(3, 9, seed=1)
    q = [np.linalg.qr(m.double().numpy().T)[0] for m in (one, other)]
    wanted = np.linalg.norm(np.arccos(np.linalg.svd(q[0].T @ q[1], compute_uv=False)))
    assert grassmann_distance(one, other) == pytest.approx(wanted, rel=1e-9)


def test_alignment_means_over_pairs() -> None:
    heads = [(draw(2, 6, seed=n), draw(2, 4, seed=9 + n)) for n in range(3)]
    found = head_alignment(heads)
    pairs = [(0, 1), (0, 2), (1, 2)]
    cosines = [update_cosine(heads[a], heads[b]) for a, b in pairs]
    assert found["cosine"] == pytest.approx(sum(filter(None, cosines)) / 3)
    assert found["grassmann"] == pytest.approx(sum(grassmann_distance(heads[a][0], heads[b][0]) for a, b in pairs) / 3)
    assert head_alignment(heads[:1]) == {"cosine": None, "grassmann": None}


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """tools/analyze.py with some words, in this process: exit status and output."""

    def run(*words: object) -> tuple[int, str]:
        status = 0
        try:
            command.main([*map(str, words)])
        except SystemExit as end:
            status = int(end.code or 0)
        return status, "".join(capsys.readouterr())

    return run


def test_a_switchlora_run(call: Call, tmp_path: Path) -> None:
    run = PlainRun(small_config(optim__lr=0.02, train__steps=8, method__switch__total_steps=None))
    initial = LlamaForCausalLM(run.config.model, VOCAB)
    initialize_weights(initial, run.config.train.seed)
    records = []
    for step, batch in enumerate(make_batches(run.config, 6)):
        loss, _, switched = run.step(step, batch)
        records.append({"step": step + 1, "loss": loss, "switched": switched})
    save(run, tmp_path / "checkpoints" / "step-00000006")
    (tmp_path / "config.yaml").touch()
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    status, output = call(tmp_path, "--layers", "0,2")
    assert status == 0 and "updates since the initial weights of seed 0" in output, output
    found = json.loads((tmp_path / "analysis" / "analysis.json").read_text())
    names = {path.name for path in (tmp_path / "analysis").iterdir()}
    assert names == {
        "analysis.json",
        "spectra_weights.png",
        "spectra_updates.png",
        "effective_rank.png",
        "switching.png",
    }
    kinds = found["checkpoints"][0]["kinds"]
    assert set(kinds) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    spectra = {"weight": [], "update": []}
    for layer in (0, 2):
        name = f"model.layers.{layer}.mlp.up_proj"
        now = run.method.linears[name].effective_weight().detach().double()
        spectra["weight"].append(np.linalg.svd(now.numpy(), compute_uv=False))
        update = now - initial.get_parameter(f"{name}.weight").detach().double()
        spectra["update"].append(np.linalg.svd(update.numpy(), compute_uv=False))
    for what, values in spectra.items():
        np.testing.assert_allclose(kinds["up_proj"][what]["spectrum"], np.mean(values, axis=0), atol=1e-5)
    switching = found["switching"]
    assert switching["switched"] == [record["switched"] for record in records]
    layers = 7 * 3  # every matrix has more than 7 candidates
    assert switching["expected"][0] == pytest.approx(2 * layers * 7 / 4 * 0.3 ** (1 / 8))
    slots = run.method.state.slots["A"]
    smaller = [48, 24, 24, 48, 48, 48, 48] * 3
    assert switching["slots_seen"][0]["A"] == pytest.approx(
        np.mean([len(set(s)) / c for s, c in zip(slots, smaller, strict=True)])
    )
    (tmp_path / "metrics.jsonl").unlink()
    status, output = call(tmp_path, "--layers", "0")
    assert status == 2 and "metrics.jsonl has no records of switching: put the run's own file back" in output, output


def test_heads_of_lte(call: Call, tmp_path: Path) -> None:
    """A checkpoint with LTE's names, written here: two heads over one W."""
    config = small_config("lora", method__alpha=14.0)
    names = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(config.model.num_layers)]
    factors = {(n, name): (draw(7, 48, seed=n), draw(7, 48, seed=7 + n)) for n in range(2) for name in names}
    linears = LlamaForCausalLM(config.model, VOCAB).decoder_linears()
    tensors = {f"{each.name}.weight": draw(*each.linear.weight.shape, seed=5) for each in linears}
    for (n, name), (A, B) in factors.items():
        tensors |= {f"head_{n:02d}/{name}.lora_A": A, f"head_{n:02d}/{name}.lora_B": B}
    for step, scale in ((3, 1.0), (6, 2.0)):
        folder = tmp_path / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        slices = [
            TensorSlice(k, tuple(t.shape), (0, 0), t * (scale if "lora_B" in k else 1), None)
            for k, t in tensors.items()
        ]
        write_slices(folder / "tensors-00000.safetensors", slices)
        state = {"step": step, "config": config.to_dict(), "vocab_size": VOCAB}
        (folder / "state.json").write_text(json.dumps(state))
        seal(folder, step)
    (tmp_path / "config.yaml").touch()
    status, output = call(tmp_path, "--base", "first", "--out", tmp_path / "out")
    assert status == 0, output
    found = json.loads((tmp_path / "out" / "analysis.json").read_text())
    wanted = head_alignment([factors[n, names[0]] for n in range(2)])
    for entry in found["checkpoints"]:
        assert entry["heads"]["q_proj"] == pytest.approx(wanted)
    update = 2.0 * sum(B.t().double() @ A.double() for A, B in (factors[n, names[0]] for n in range(2))) / 2
    values = np.linalg.svd(update.numpy(), compute_uv=False)
    np.testing.assert_allclose(found["checkpoints"][1]["kinds"]["q_proj"]["update"]["spectrum"], values, atol=1e-4)
    assert found["checkpoints"][0]["kinds"]["q_proj"]["update"]["effective_rank"] == 0
    assert (tmp_path / "out" / "heads.png").exists() and not (tmp_path / "out" / "switching.png").exists()


def test_switches_inside_a_head(call: Call, tmp_path: Path) -> None:
    run = PlainRun(lte_config(method__lte__inner="switchlora", method__alpha=1.0))
    records = []
    for step, batch in enumerate(make_batches(run.config, 4)):
        loss, _, switched = run.step(step, batch)
        records.append({"step": step + 1, "loss": loss, "switched": switched})
    save(run, tmp_path / "checkpoints" / "step-00000006")
    (tmp_path / "config.yaml").touch()
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    status, output = call(tmp_path, "--layers", "0")
    assert status == 0, output
    found = json.loads((tmp_path / "analysis" / "analysis.json").read_text())["switching"]
    assert found["switched"] == [record["switched"] for record in records] and sum(found["switched"]) > 0
    slots = run.method.state.slots["B"]  # type: ignore[attr-defined]
    smaller = [48, 24, 24, 48, 48, 48, 48] * 3
    wanted = np.mean([len(set(s)) / c for s, c in zip(slots, smaller, strict=True)])
    assert found["slots_seen"][0]["B"] == pytest.approx(wanted)


def test_a_reset_merge_leaves_no_cosine_and_says_so(call: Call, tmp_path: Path) -> None:
    run = PlainRun(
        lte_config(method__lte__local_heads=2, method__lte__merge_form="reset", method__lte__merge_interval=3)
    )
    for step, batch in enumerate(make_batches(run.config, 3)):
        run.step(step, batch)
    save(run, tmp_path / "checkpoints" / "step-00000006")
    (tmp_path / "config.yaml").touch()
    status, output = call(tmp_path, "--layers", "0")
    assert status == 0 and "no cosine where B is zero" in output, output
    assert json.loads((tmp_path / "analysis" / "analysis.json").read_text())["checkpoints"][0]["heads"]["q_proj"][
        "grassmann"
    ]


@pytest.mark.parametrize("base", ["fp32", "nf4"])
def test_the_mean_of_local_heads_is_what_a_merge_would_make(call: Call, tmp_path: Path, base: str) -> None:
    """Between merges, where their shared matrix is not the W of any head's adapter."""
    run = PlainRun(lte_config(method__lte__local_heads=2, method__lte__base=base, optim__lr=0.02))
    for step, batch in enumerate(make_batches(run.config, 5)):
        run.step(step, batch)
    save(run, tmp_path / "checkpoints" / "step-00000006")
    (tmp_path / "config.yaml").touch()
    status, output = call(tmp_path, "--layers", "0")
    assert status == 0, output
    found = json.loads((tmp_path / "analysis" / "analysis.json").read_text())["checkpoints"][0]["kinds"]
    mean = dict(run.method.evaluated().named_parameters())["model.layers.0.mlp.up_proj.weight"]
    wanted = np.linalg.svd(mean.detach().double().numpy(), compute_uv=False)
    np.testing.assert_allclose(found["up_proj"]["weight"]["spectrum"], wanted, rtol=1e-4)


def test_the_switching_of_a_run_that_began_with_full_rank_steps(call: Call, tmp_path: Path) -> None:
    """Its schedule counts from the method's own start; before it there is nothing to switch."""
    changes = {"train__steps": 8, "method__switch__total_steps": None, "method__full_rank_steps": 3}
    run = PlainRun(small_config(**changes))
    save(run, tmp_path / "checkpoints" / "step-00000006")
    (tmp_path / "config.yaml").touch()
    records = [{"step": step, "loss": 3.0, "switched": 0} for step in range(1, 7)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    status, output = call(tmp_path, "--layers", "0")
    assert status == 0, output
    switching = json.loads((tmp_path / "analysis" / "analysis.json").read_text())["switching"]
    assert switching["steps"] == [4, 5, 6]
    assert switching["expected"][0] == pytest.approx(2 * 21 * 7 / 4 * 0.3 ** (1 / 5))


def test_odd_input_is_one_line_and_status_2(call: Call, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for words, message in (
        ([tmp_path / "nowhere"], "is not a run folder: it has no config.yaml"),
        ([tmp_path / "run"], "has no published checkpoint to analyse"),
        ([tmp_path / "run", "--layers", "x"], "--layers must be numbers with commas"),
        ([tmp_path / "run", "--device", "nope"], "--device nope cannot be used here"),
    ):
        if message.startswith("has"):
            (tmp_path / "run" / "config.yaml").touch()
        status, output = call(*words)
        assert status == 2 and message in output and output.count("\n") == 1, output


def test_a_failing_plot_costs_no_analysis(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "megatron_switchlora.study.analysis.command.analyze", lambda *given: {"run": "$x_", "checkpoints": []}
    )  # of which none can be drawn
    monkeypatch.setattr("megatron_switchlora.study.analysis.command.describe", lambda *given: "the numbers")
    status, output = call(tmp_path)
    assert status == 0 and output.splitlines()[1] == "the numbers", output
    assert output.startswith("warning: drawing the plots failed (") and output.count("\n") == 2
    assert json.loads((tmp_path / "analysis" / "analysis.json").read_text())["run"] == "$x_"
