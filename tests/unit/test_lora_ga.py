"""LoRA-GA: the theorem of its first step, the decomposition, the options, and the memory that gradients take."""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_switchlora.config.errors import UserError
from megatron_switchlora.config.method import LoraGaConfig
from megatron_switchlora.config.rules import validate
from megatron_switchlora.config.run import RunConfig
from megatron_switchlora.data.loader import BatchOrder
from megatron_switchlora.distributed.mesh import lone_mesh
from megatron_switchlora.distributed.shard import Axis, Split, named_generator
from megatron_switchlora.lowrank.linear import LowRankLinear
from megatron_switchlora.lowrank.lora_ga import pair_indices, randomised_svd, singular_pairs
from megatron_switchlora.methods import ga_gradients
from megatron_switchlora.methods.ga_gradients import find_factors, gradient_batches, mean_gradients, sum_gradients
from megatron_switchlora.model.llama.model import LlamaForCausalLM
from megatron_switchlora.model.protocol import initialize_weights
from megatron_switchlora.study.coverage import covered
from tests.dist.launch import REPOSITORY, clean_environment, run_scripts
from tests.plain import VOCAB, PlainRun, make_samples, small_config
from tests.system.commands import SMALL, write_corpus

CPU = torch.device("cpu")
EXACT = LoraGaConfig(samples=7, svd="exact")  # 7 samples: the last micro-batch is smaller


def ga_config(name: str = "lora", ga: LoraGaConfig = EXACT, **changes: Any) -> RunConfig:
    fixed = {"method__init": "lora_ga", "method__rslora": True, "method__alpha": 3.0, "method__ga": ga}
    return small_config(name, **{**fixed, **changes})


def dense_model(config: RunConfig) -> LlamaForCausalLM:
    model = LlamaForCausalLM(config.model, VOCAB)
    initialize_weights(model, config.train.seed)
    return model.double()


def drawn_batch(config: RunConfig) -> Tensor:
    """All samples of the gradient at once."""
    return torch.cat(list(gradient_batches(config, lone_mesh(), make_samples(config))))


def plain_gradients(config: RunConfig, model: LlamaForCausalLM) -> dict[str, Tensor]:
    """dL/dW of the whole batch, by autograd alone."""
    tokens = drawn_batch(config)
    model(tokens[:, :-1], tokens[:, 1:]).backward()
    return {name: linear.weight.grad for name, _, _, linear in model.decoder_linears()}  # type: ignore[misc]


def relative(mine: Tensor, goal: Tensor) -> float:
    return float((mine - goal).norm() / goal.norm())


def best_approximation(matrix: Tensor, rank: int) -> tuple[Tensor, float]:
    """The nearest matrix of this rank, and how far it is."""
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U[:, :rank] * S[:rank] @ Vh[:rank], float(S[rank:].norm())


def test_the_first_sgd_step_is_the_best_approximation_of_the_gradient() -> None:
    """The paper's theorem 3.1, in float64: to first order in lr every matrix moves by -lr zeta times the best rank-2r
    approximation of its gradient, zeta = s^2 c^2; all of the step adds lr^2 s^3 G A^T B^T G."""
    config, lr = ga_config(), 0.25
    start = dense_model(config)
    gradients = plain_gradients(config, start)
    run = PlainRun(config, torch.float64)
    tokens = drawn_batch(config)
    run.model(tokens[:, :-1], tokens[:, 1:]).backward()
    s, r = config.method.scaling, config.method.rank
    for name, linear in run.method.linears.items():  # type: ignore[attr-defined]
        G, before = gradients[name], start.get_submodule(name).weight.detach()
        assert relative(linear.effective_weight(), before) < 1e-13, name
        assert relative(linear.weight, before) > 0.1, name
        A, B = linear.lora_A.detach().clone(), linear.lora_B.detach().t().clone()
        dA, dB = linear.lora_A.grad, linear.lora_B.grad.t()
        c = linear.out_features**0.25 / math.sqrt(config.method.ga.gamma)
        best, tail = best_approximation(G, 2 * r)
        first_order = -lr * s * (dB @ A + B @ dA)
        assert relative(first_order, -lr * (s * c) ** 2 * best) < 1e-10, name
        assert float((first_order / (-lr * (s * c) ** 2) - G).norm()) == pytest.approx(tail, rel=1e-9), name
        assert tail > 0.01 * float(G.norm()), name  # rank 2r is not all of G
        with torch.no_grad():
            linear.lora_A -= lr * linear.lora_A.grad
            linear.lora_B -= lr * linear.lora_B.grad
        second_order = lr**2 * s**3 * (G @ A.t() @ B.t() @ G)
        step = linear.effective_weight() - before
        # the step is a small difference of weights: rounding of W is what is left
        assert relative(step - first_order, second_order) < 1e-6, name


def test_micro_batches_add_up_to_the_whole_batch() -> None:
    config = ga_config()
    model = dense_model(config)
    goal = plain_gradients(config, model)
    found = mean_gradients(config, model, lone_mesh(), make_samples(config), CPU)
    assert found.keys() == goal.keys()
    for name, gradient in found.items():
        assert gradient.dtype == torch.float64 and relative(gradient, goal[name]) < 1e-13, name


def test_the_samples_depend_on_the_seed_alone() -> None:
    config = ga_config()
    samples, tokens = make_samples(config), drawn_batch(config)
    other = ga_config(train__micro_batch_size=3, train__global_batch_size=6)
    assert torch.equal(drawn_batch(other), tokens)
    assert not torch.equal(drawn_batch(ga_config(train__seed=1)), tokens)
    own = BatchOrder(len(samples), 7, config.train.seed).indices(0)
    assert not torch.equal(samples.batch(own), tokens)  # not the first batches of training
    with pytest.raises(UserError, match=r"method.ga.samples 7 must not exceed the number of training samples, 5"):
        gradient_batches(config, lone_mesh(), make_samples(config, 5))


def test_estimating_leaves_the_model_as_it_was() -> None:
    config = ga_config()
    model = dense_model(config)
    before = [param.detach().clone() for param in model.parameters()]
    find_factors(config, model, lone_mesh(), make_samples(config), CPU)
    for mine, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(mine, old) and mine.requires_grad and mine.grad is None
        assert not mine._post_accumulate_grad_hooks


def test_a_gradient_without_directions_is_refused() -> None:
    config = ga_config()
    model = dense_model(config)
    with torch.no_grad():
        model.lm_head.weight.zero_()  # then nothing reaches the decoder
    with pytest.raises(UserError, match=r"gradient of model.layers.0.self_attn.q_proj over 7 samples has norm 0.0"):
        find_factors(config, model, lone_mesh(), make_samples(config), CPU)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(UserError, match=r"over 7 samples has norm nan"):
        find_factors(config, model, lone_mesh(), make_samples(config), CPU)


def decaying(m: int, n: int, power: float) -> Tensor:
    """A matrix with singular values 1, 2^-power, 3^-power ..."""
    generator = torch.Generator().manual_seed(m + n)
    left, right = (torch.linalg.qr(torch.randn(k, k, generator=generator, dtype=torch.float64)).Q for k in (m, n))
    k = min(m, n)
    return left[:, :k] * torch.arange(1, k + 1, dtype=torch.float64) ** -power @ right[:k]


@pytest.mark.parametrize("shape", [(60, 40), (40, 60)])
@pytest.mark.parametrize("dim", [0, 1])
def test_the_randomised_decomposition_is_close_to_the_exact_one(shape: tuple[int, int], dim: int) -> None:
    G, split = decaying(*shape, power=1.0), Split(dim, shape[dim], Axis())

    def pairs(**options: Any) -> tuple[Tensor, Tensor, Tensor]:
        return singular_pairs(G, split, 6, LoraGaConfig(**options), named_generator(0, "x"))

    def gap(mine: tuple[Tensor, ...]) -> float:
        return max(float((a - b).abs().max()) for a, b in zip(mine, exact, strict=True))

    exact = pairs(svd="exact")
    assert torch.allclose(exact[1], torch.arange(1, 7, dtype=torch.float64).reciprocal())
    assert torch.allclose(G @ exact[2], exact[0] * exact[1], atol=1e-12)
    assert gap(pairs(power_iterations=40)) < 1e-9
    assert gap(pairs(oversample=60, power_iterations=0)) < 1e-9  # Q = min(m, n)
    assert gap(pairs()) < 0.05 < gap(pairs(oversample=0, power_iterations=0))
    right = exact[2]
    assert torch.all(right.gather(0, right.abs().argmax(0, keepdim=True)) > 0)
    flipped = singular_pairs(-G, split, 6, LoraGaConfig(svd="exact"), named_generator(0, "x"))
    assert torch.allclose(flipped[2], right) and torch.allclose(flipped[0], -exact[0])


def test_a_matrix_of_low_rank_still_gives_orthonormal_vectors() -> None:
    G = decaying(50, 30, 1.0)[:, :3] @ torch.ones(3, 30, dtype=torch.float64)
    left, _, right = randomised_svd(G, Split(0, 50, Axis()), 8, 4, named_generator(0, "x"))
    for vectors in (left, right):
        assert torch.allclose(vectors.t() @ vectors, torch.eye(8, dtype=torch.float64), atol=1e-12)


def test_directions_are_disjoint() -> None:
    pairs = {d: pair_indices(d, 3, named_generator(0, "x")) for d in ("ArB2r", "A2rBr", "ArBr", "random")}
    lists = {d: (a.tolist(), b.tolist()) for d, (a, b) in pairs.items()}
    assert lists["ArB2r"] == ([0, 1, 2], [3, 4, 5]) and lists["A2rBr"] == ([3, 4, 5], [0, 1, 2])
    assert lists["ArBr"] == ([1, 3, 5], [0, 2, 4])
    assert sorted(lists["random"][0] + lists["random"][1]) == [0, 1, 2, 3, 4, 5]
    assert lists["random"] not in [lists[d] for d in ("ArB2r", "A2rBr", "ArBr")]


def lengths(linear: LowRankLinear) -> tuple[Tensor, Tensor]:
    return linear.lora_A.detach().norm(dim=1), linear.lora_B.detach().norm(dim=1)


@pytest.mark.parametrize("scale", ["stable", "backward", "gd", "unit", "weight"])
def test_every_vector_has_the_length_of_the_scale(scale: Any) -> None:
    config = ga_config(ga=LoraGaConfig(samples=7, svd="exact", scale=scale, gamma=4.0))
    run, start = PlainRun(config, torch.float64), dense_model(config)
    s, r = config.method.scaling, config.method.rank
    for name, linear in run.method.linears.items():  # type: ignore[attr-defined]
        W = start.get_submodule(name).weight.detach()
        (m, n), sigma = W.shape, torch.linalg.svdvals(W)[:r]
        c = {"stable": m**0.25 / 2, "backward": n**0.25 / 2, "gd": 1 / s, "unit": 1.0,
             "weight": float((sigma / s).sqrt().mean())}[scale]  # fmt: skip
        for found in lengths(linear):
            assert torch.allclose(found, torch.full_like(found, c), rtol=1e-10), name


@pytest.mark.parametrize("scale", ["unit", "stable"])
def test_gaussian_vectors_need_no_gradient(monkeypatch: pytest.MonkeyPatch, scale: Any) -> None:
    monkeypatch.setattr(ga_gradients, "mean_gradients", None)
    run = PlainRun(ga_config(ga=LoraGaConfig(vectors="gaussian", scale=scale)))
    for linear in run.method.linears.values():  # type: ignore[attr-defined]
        c = linear.out_features**0.25 / 4 if scale == "stable" else 1.0
        for found in lengths(linear):
            assert float(found.square().mean()) == pytest.approx(c**2, rel=0.4)
            assert float(found.std()) > 0.01 * c


def test_switchlora_begins_from_the_same_vectors() -> None:
    lora, switching = (PlainRun(ga_config(name), torch.float64) for name in ("lora", "switchlora"))
    for mine, other in zip(lora.method.matrices(), switching.method.matrices(), strict=True):
        assert torch.equal(mine, other)
    for mine, other in zip(*(run.method.linears.values() for run in (lora, switching)), strict=True):  # type: ignore
        assert torch.equal(mine.weight, other.weight)
    drawn = PlainRun(small_config("switchlora"), torch.float64)
    held = [dict(run.method.bank.tensors()) for run in (drawn, switching)]  # type: ignore[attr-defined]
    assert all(torch.equal(held[0][key], held[1][key]) for key in held[0])  # candidates as usual


class LiveBytes(TorchDispatchMode):
    """Most bytes alive at once of the storages of at least `floor` bytes made while it is on, however they are held."""

    def __init__(self, floor: int) -> None:
        super().__init__()
        self.floor = floor
        self.now = self.most = 0

    def _freed(self, size: int) -> None:
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs or {})) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in given and storage.nbytes() >= self.floor:
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.nbytes())
        self.most = max(self.most, self.now)
        return out


def peak_bytes(layers: int) -> tuple[int, int]:
    """While the gradients of one sample of two tokens are estimated: the most bytes alive at once of tensors the size
    of a matrix or larger, which no activation is, and the bytes of the largest matrix."""
    config = ga_config(model__num_layers=layers, model__hidden_size=96, model__intermediate_size=160)
    model = ga_gradients.working_copy(config, dense_model(config), CPU)
    sizes = [linear.weight.nbytes for _, _, _, linear in model.decoder_linears()]
    live = LiveBytes(min(sizes))

    def batches() -> Iterator[Tensor]:
        live.__enter__()  # the sums on the host are there already
        yield torch.tensor([[1, 2, 3]])

    try:
        sum_gradients(model, batches(), 1, CPU)
    finally:
        live.__exit__(None, None, None)
    return live.most, max(sizes)


def test_memory_of_gradients_does_not_grow_with_the_layers() -> None:
    (two, matrix), (eight, _) = peak_bytes(2), peak_bytes(8)
    print(f"\ngradients alive: {two / matrix:.2f} matrices at 2 layers, {eight / matrix:.2f} at 8")
    assert 2 * matrix == two == eight  # gate and up run backward together


def test_coverage_tool(tmp_path: Path) -> None:
    environment = {**clean_environment(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    options = [*SMALL, "--data.files", f"{write_corpus(tmp_path / 'corpus')}/*.txt", "--data.tokenizer", "char"]
    tool, words = REPOSITORY / "tools" / "lora_ga_coverage.py", ["--out", str(tmp_path / "out" / "c"), *options]
    statuses, output = run_scripts(tool, words, [environment], tmp_path, timeout=120)
    assert statuses == [0], output
    kinds = json.loads((tmp_path / "out" / "c.json").read_text())["kinds"]
    assert (tmp_path / "out" / "c.png").stat().st_size > 5000
    assert list(kinds) == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    for entry in kinds.values():
        shares = entry["covered"]
        assert len(shares) == 32 and entry["layers"] == 2
        assert shares == sorted(shares) and shares[0] > 0.03 and shares[-1] == pytest.approx(1)
        assert entry["rank_6"] == shares[5] and entry["rank_12"] == shares[11]
    assert covered(torch.diag(torch.tensor([2.0, 1.0, 0.0]))).tolist() == pytest.approx([0.8, 1, 1])


def test_rules() -> None:
    def refused(words: str, name: str = "lora", **changes: Any) -> None:
        with pytest.raises(UserError, match=words):
            validate(ga_config(name, **changes))

    validate(ga_config())
    validate(ga_config("switchlora"))
    validate(ga_config(method__rank=12))  # 24 key/value columns
    refused(r"2 \* method.rank .* here 24, but are 26: lower method.rank to 12", method__rank=13)
    refused(r"lora_ga initialises adapters, and method.name full has none", "full")
    refused(r"method.rslora is False: set it to true", method__rslora=False)
    refused(r"method.ga.gamma, method.ga.samples belong to .* but method.init is classic", method__init="classic",
            ga=LoraGaConfig(gamma=4.0, samples=3))  # fmt: skip
    refused(r"method.ga.svd exact needs .* parallel.tp is 2: use randomised", parallel__tp=2)
    wrong = {"gamma": 0.0, "samples": 0, "oversample": -1, "power_iterations": -1}
    for field, value in wrong.items():
        refused(f"method.ga.{field} must", ga=LoraGaConfig(**{field: value}))
