"""`--dry_run`: the paper's counts, every shipped configuration, and its numbers against tensors that really exist."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import pytest
import torch

from megatron_switchlora.config.command_line import parse_arguments
from megatron_switchlora.config.ds_config import Zero, read_ds_config, zero_settings
from megatron_switchlora.config.errors import UserError
from megatron_switchlora.config.model import ModelConfig
from megatron_switchlora.config.run import RunConfig
from megatron_switchlora.distributed.mesh import Mesh
from megatron_switchlora.methods import SwitchLora, build_method
from megatron_switchlora.model.llama.model import LlamaForCausalLM
from megatron_switchlora.model.protocol import initialize_weights
from megatron_switchlora.planning.counts import count_run
from megatron_switchlora.planning.dry_run import plan
from megatron_switchlora.planning.memory import memory_items, peak_bytes
from megatron_switchlora.planning.traffic import full_rank_bytes, gradient_bytes
from tests.plain import VOCAB, PlainRun, make_batches, peak_of, small_config

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "launch" / "configs"
OVERLAYS = sorted(path.stem for path in (CONFIGS / "methods").glob("*.yaml"))
MODELS = {"130m": (8, 24), "250m": (8, 32, 128), "350m": (8, 32, 128), "1.3b": (8, 32, 128)}
RATES = {
    "full": 0.001,
    "lora": 0.01,
    "relora": 0.001,
    "switchlora": 0.02,
    "galore": 0.01,
    "lte": 0.00005,
    "lte_switchlora": 0.02,
    "mhlora": 0.00005,
}
TABLE_4 = {
    ("250m", "full"): 247.5, ("250m", "switchlora_r128"): 98.9, ("250m", "switchlora_r256"): 148.4,
    ("350m", "full"): 368.2, ("350m", "switchlora_r128"): 125.6, ("350m", "switchlora_r256"): 185.4,
    ("1.3b", "full"): 1339.5, ("1.3b", "switchlora_r256"): 370.7, ("1.3b", "switchlora_r512"): 609.7,
}  # fmt: skip


@cache
def parsed(model: str, overlay: str, *options: str) -> RunConfig:
    """A model's file with a method's file over it."""
    files = [f"--config={CONFIGS}/llama_{model}.yaml", f"--config={CONFIGS}/methods/{overlay}.yaml"]
    return parse_arguments([*files, *options]).config


def shipped(model: str, overlay: str, *options: str, tp: int = 1, heads: int = 1) -> RunConfig:
    """The same, parsed once, for the caller to change."""
    config = copy.deepcopy(parsed(model, overlay, *options))
    config.parallel.tp, config.parallel.lte_heads = tp, heads
    return config


def row(text: str, name: str) -> list[float]:
    """Numbers of a line of the report."""
    (line,) = re.findall(rf"^ +{re.escape(name)} (.*)$", text, flags=re.MULTILINE)
    return [float(number.replace(",", "")) for number in re.findall(r"[\d,]+\.?\d*", line)]


def kinds(config: RunConfig, tp: int = 1, dp: int = 1, zero: Zero | None = None, vocab: int = VOCAB) -> dict[str, int]:
    """Bytes by kind, without what the kind's name says about precision and place."""
    items = memory_items(config, vocab, tp, dp, zero or Zero(0))
    return {item.kind.split(",")[0].split(" (")[0]: item.bytes for item in items}


@pytest.mark.parametrize("tp", [1, 2, 8])
def test_table_4_whatever_the_mesh(tp: int) -> None:
    for (model, overlay), millions in TABLE_4.items():
        config = shipped(model, overlay, tp=tp)
        text = plan(config, read_ds_config(None), world_size=8)
        assert f"dp {8 // tp} x tp {tp};" in text
        assert row(text, "total")[0] == millions, (model, overlay)
        assert row(text, "full-rank training")[0] == TABLE_4[model, "full"], (model, overlay)
        held = count_run(config, 32100, tp)
        assert row(text, "total")[-1] == held.trainable + held.fixed.total()
    exact = 2 * 32100 * 2048 + 49 * 2048 + 24 * 512 * (4 * 2 * 2048 + 3 * (2048 + 5461))
    assert row(plan(shipped("1.3b", "switchlora_r512", tp=tp), {}, 8), "total")[1] == exact == 609_720_320


@pytest.mark.parametrize("model", MODELS)
def test_every_shipped_combination(model: str) -> None:
    assert {overlay.partition("_r")[0] for overlay in OVERLAYS} == set(RATES)
    for overlay in OVERLAYS:
        config = shipped(model, overlay)
        name, _, rank = overlay.partition("_r")
        heads = name.startswith("lte")
        assert config.method.name == name.removesuffix("_switchlora" * heads)
        assert not rank or config.method.rank == int(rank)
        assert config.optim.lr == RATES[name]
        assert heads or config.optim.dense_lr == (0.001 if name == "mhlora" else RATES[name])
        given = read_ds_config(str(ROOT / "ds_configs" / "zero0.json") if name == "galore" else None)
        for world in MODELS[model]:
            config.parallel.lte_heads = world if heads else 1
            text = plan(config, given, world)
            mesh = f"lte {world} x dp 1" if heads else f"lte 1 x dp {world}"
            assert f"{mesh} x tp 1;" in text and "32,100" in text
            assert ("LTE heads: a rank hands" in text) == (heads and world > 1)
            assert row(text, "peak: throughout + the larger phase (estimate)")[0] < 70, "80 GB hold every one"


@pytest.mark.parametrize("overlay", ["lte_r64", "lte_switchlora_r128"])
def test_a_head_a_node(overlay: str) -> None:
    """1, 4 and 16 nodes of 8 GPUs, each node a head."""
    for nodes in (1, 4, 16):
        text = plan(shipped("1.3b", overlay, heads=nodes), {}, 8 * nodes)
        assert f"lte {nodes} x dp 8 x tp 1;" in text
        assert (f"Merge of {nodes} LTE heads: a rank hands" in text) == (nodes > 1)


def test_shipped_numbers_are_the_papers() -> None:
    for model, tokens, samples in (("130m", 256, 600), ("250m", 512, 1152), ("350m", 512, 1152), ("1.3b", 512, 1536)):
        alone = parse_arguments([f"--config={CONFIGS}/llama_{model}.yaml"]).config
        train, data = alone.train, alone.data
        assert (train.seq_len, train.global_batch_size) == (tokens, samples)
        assert (train.steps, train.warmup_steps, train.eval_interval, train.precision) == (40000, 100, 1000, "bf16")
        assert train.eval_samples is not None and 0 <= train.eval_samples * tokens - 10_000_000 < tokens
        assert (data.source, data.hf_name, data.hf_config) == ("hf", "allenai/c4", "en")
        assert (data.tokenizer, data.max_documents) == ("t5-base", 46_000_000)
        method = alone.method
        assert (method.name, method.switch.interval0, method.switch.ratio, method.switch.freeze_steps) == (
            "switchlora",
            40,
            0.1,
            5,
        )
        assert method.rank == {"130m": 128, "250m": 256, "350m": 256, "1.3b": 512}[model]


def test_options_override_both_files() -> None:
    config = parsed("1.3b", "switchlora_r256", "--method.rank=64", "--parallel.tp=4")
    assert (config.method.rank, config.parallel.tp, config.model.intermediate_size) == (64, 4, 5461)


def test_gradient_bytes() -> None:
    """Section 4 of the paper: 54.5 % and 72.3 % saved. Tensor parallelism replicates one factor of each adapter."""
    for overlay, saved in (("switchlora_r512", "54.5% saved"), ("switchlora_r256", "72.3% saved")):
        text = plan(shipped("1.3b", overlay, "--model.pad_multiple=1"), {}, 8)
        assert saved in text
    config = shipped("1.3b", "switchlora_r512", "--model.pad_multiple=1")
    assert gradient_bytes(config, 32100, 1, 8, Zero(1)) == (2 * 609_720_320, 2 * 1_339_492_352)
    config = shipped("1.3b", "switchlora_r512")  # 43 rows or columns of three matrices, 28 of embedding and head
    once, full = gradient_bytes(config, 32100, 1, 8, Zero(1))
    words = 2 * 28 * 2048
    assert once == 2 * (609_720_320 + 24 * 3 * 43 * 512 + words)
    assert full == 2 * (1_339_492_352 + 24 * 3 * 43 * 2048 + words)
    assert gradient_bytes(config, 32100, 1, 8, Zero(2)) == (16 * once, 16 * full)
    assert gradient_bytes(config, 32100, 1, 8, Zero(1, fp32_accumulation=True))[0] == once
    assert gradient_bytes(config, 32100, 8, 1, Zero(1)) == (0, 0)
    assert "35.5% more" in plan(shipped("1.3b", "switchlora_r512", tp=8), {}, 64)
    assert full_rank_bytes(once, config, 32100, 1) == pytest.approx(full)
    mine = gradient_bytes(config, 32100, 8, 8, Zero(1))
    assert full_rank_bytes(mine[0], config, 32100, 8) == pytest.approx(mine[1])


def test_shards_are_padded_and_totals_are_not() -> None:
    config = shipped("1.3b", "switchlora_r512")
    whole = count_run(config, 32100)
    mine = count_run(config, 32100, 8)
    assert mine["embedding"] == mine["head"] == 4032 * 2048 and 4032 % 64 == 0 and 4013 * 8 - 32100 == 4
    assert mine["matrices"] == 24 * (4 * 2048 * 256 + 3 * 2048 * 704) and 704 % 64 == 0 and 683 * 8 - 5461 == 3
    assert mine["adapters"] == 24 * 512 * (4 * (2048 + 256) + 3 * (2048 + 704))
    assert mine["norms"] == whole["norms"]
    assert whole["matrices"] == 24 * (4 * 2048 * 2048 + 3 * 2048 * 5461)
    even = small_config()
    local, total = (count_run(even, VOCAB - 1, tp) for tp in (2, 1))
    assert (2 * local["matrices"], 2 * local["embedding"]) == (total["matrices"], total["embedding"])


def test_bank_sizes() -> None:
    """1,912.6 M values at 1.3B; spread by candidate where a factor is replicated, padded to whole candidates."""
    bare = shipped("1.3b", "switchlora_r512", "--model.pad_multiple=1")
    assert round(kinds(bare, zero=Zero(), vocab=32100)["candidate bank"] / 2 / 1e6, 1) == 1912.6
    config = shipped("1.3b", "switchlora_r512")
    whole = kinds(config, zero=Zero(), vocab=32100)["candidate bank"]
    assert whole - kinds(bare, zero=Zero(), vocab=32100)["candidate bank"] == 2 * 24 * 3 * 2048 * 43  # 5504 for 5461
    assert kinds(config, 2, 8, Zero(), 32100)["candidate bank"] == whole // 2  # 2752 on a rank
    config.method.switch.bank_spread = "dp"
    assert kinds(config, 1, 8, Zero(), 32100)["candidate bank"] == whole // 8
    config.method.switch.bank_spread = "tp"
    config.method.switch.bank_device = "host"
    items = memory_items(config, 32100, 1, 8, Zero())
    assert [item.bytes for item in items if item.phase == "host"] == [whole]
    config.method.switch.bank_device = "device"
    assert peak_bytes(memory_items(config, 32100, 1, 8, Zero())) == peak_bytes(items) + whole
    small = small_config()
    small.method.rank = 24  # min(m, n) of k and v is 24: nothing to switch there
    other = 3 * (2 * 48 * (48 + 48) + 3 * 48 * (48 + 76))
    assert kinds(small)["candidate bank"] == 4 * other
    assert "candidate bank" not in kinds(small_config("lora"))


def size(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("name", ["full", "lora", "switchlora"])
def test_memory_is_that_of_built_objects(name: str) -> None:
    for changes in ({}, {"model__tie_embeddings": True, "method__rank": 24}):
        run = PlainRun(small_config(name, **changes))
        found = kinds(run.config)
        states = list(run.optimizer.state.values())
        assert found["trainable parameters"] == size(run.params) == found["gradients"]
        assert found["Adam moments"] == size(t for state in states for t in (state["exp_avg"], state["exp_avg_sq"]))
        assert found["Adam step counters"] == size(state["row_step"] for state in states)
        assert found.get("frozen W", 0) == size(run.model.buffers())
        assert "fp32 masters" not in found


@pytest.mark.parametrize(("tp", "dp", "spread"), [(1, 3, "tp"), (1, 3, "dp"), (2, 2, "dp"), (4, 1, "tp"), (4, 3, "dp")])
def test_memory_is_that_of_every_rank(tp: int, dp: int, spread: str) -> None:
    """Each rank of a mesh, built alone: sizes that do not divide are padded alike on all of them."""
    config = small_config(method__switch__bank_spread=spread, method__base_spread="none" if spread == "tp" else "dp")
    config.model.num_heads, config.model.num_kv_heads, config.model.intermediate_size = 8, 4, 77
    config.train.global_batch_size = 24  # for dp 3
    found = kinds(config, tp, dp)
    for rank in range(tp * dp):
        mesh = Mesh({"lte": 1, "dp": dp, "tp": tp}, {"lte": 0, "dp": rank // tp, "tp": rank % tp}, {})
        model = LlamaForCausalLM(config.model, VOCAB, mesh.axis("tp"))
        initialize_weights(model, 0)
        method = build_method(config, model, mesh)
        assert isinstance(method, SwitchLora)
        assert found["trainable parameters"] == size(model.parameters())
        assert found["frozen W"] == size(model.buffers())
        assert found["candidate bank"] == method.bank.num_bytes()


def test_what_zero_partitions() -> None:
    """Masters and moments over the data ranks at stages 1 and 2, whole at stage 0, where fp32 needs no master."""
    config, count = shipped("1.3b", "switchlora_r512", "--model.pad_multiple=1"), 609_720_320
    for stage, ranks in ((0, 1), (1, 8), (2, 8)):
        found = kinds(config, 1, 8, Zero(stage), 32100)
        assert found["trainable parameters"] == 2 * count
        assert found["frozen W"] == 4 * 1_207_910_400
        assert found["fp32 masters"] * ranks == 4 * count and found["Adam moments"] * ranks == 8 * count
        assert found["Adam step counters"] == 4 * -(-(24 * 7 * 1024 + 51) // ranks)
    assert kinds(config, 1, 8, Zero(1, True), 32100)["gradient sums"] == 4 * count
    config.train.precision = "fp32"
    assert "fp32 masters" not in kinds(config, 1, 8, Zero(0), 32100)
    assert kinds(config, 1, 8, Zero(1), 32100)["fp32 masters"] * 8 == 4 * count


@pytest.mark.parametrize(
    ("name", "precision", "checkpointing", "compute", "cache"),
    [
        ("full", "fp32", False, "auto", "micro_batch"),
        ("full", "fp32", True, "auto", "micro_batch"),
        ("switchlora", "fp32", False, "split", "micro_batch"),
        ("switchlora", "bf16", False, "split", "micro_batch"),
        ("switchlora", "bf16", True, "split", "micro_batch"),
        ("switchlora", "bf16", False, "merged", "micro_batch"),
        ("switchlora", "bf16", True, "merged", "micro_batch"),
        ("switchlora", "bf16", False, "merged", "accumulation"),
        ("switchlora", "bf16", False, "merged", "recompute"),
        ("switchlora", "bf16", False, "auto", "recompute"),
    ],
)
def test_activations_of_a_micro_batch(
    name: str, precision: str, checkpointing: bool, compute: str, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Peak of one forward and backward pass, measured by the profiler, against the formula."""
    monkeypatch.setattr("tests.plain.VOCAB", 1000)
    config = small_config(
        name, train__precision=precision, train__activation_checkpointing=checkpointing, method__compute=compute,
        method__merged_cache=cache, train__compile="off",
    )  # fmt: skip
    config.model = ModelConfig(
        hidden_size=96, intermediate_size=250, num_layers=12 if checkpointing else 3, num_heads=4
    )
    config.train.seq_len = 64
    run = PlainRun(config)
    if precision == "bf16":
        for param in run.model.parameters():
            param.data = param.data.bfloat16()
    run.model.checkpointing = checkpointing
    tokens = make_batches(config, 1)[0][: config.train.micro_batch_size]

    def one_pass() -> None:
        run.model(tokens[:, :-1], tokens[:, 1:]).backward()

    one_pass()  # now gradients exist, and what is made once
    run.method.after_step(0)  # W + sBA is formed again
    measured = peak_of(one_pass)
    items = memory_items(config, 1000, 1, 1, Zero(0))
    formula = sum(item.bytes for item in items if item.phase == "backward")
    case = f"{name} {precision} {compute} {cache} checkpointing {checkpointing}"
    print(f"{case}: {measured:,} measured, {formula:,} by formula")
    assert formula == pytest.approx(measured, rel=0.2 if checkpointing else 0.02)


def test_copies_of_w_for_compute() -> None:
    def copies(
        cache: str = "micro_batch", compute: str = "merged", precision: str = "bf16", checkpointing: bool = False,
        tokens: int = 4096,
    ) -> tuple[int, int]:  # fmt: skip
        config = shipped("1.3b", "switchlora_r512")
        config.method.merged_cache, config.method.compute = cache, compute  # type: ignore[assignment]
        config.train.precision, config.train.activation_checkpointing = precision, checkpointing  # type: ignore[assignment]
        config.train.micro_batch_size, config.train.seq_len = 1, tokens
        found = kinds(config, 1, 8, Zero(), 32100)
        return found.get("W + sBA", 0), found.get("W for the split form", 0)

    square = 24 * 4 * 2048 * 2048
    matrices = square + 24 * 3 * 2048 * 5504
    assert copies() == (2 * matrices, 0)
    assert copies(checkpointing=True) == (2 * matrices // 24, 0)
    assert copies("accumulation", checkpointing=True) == (2 * matrices, 0)
    assert copies("recompute") == (2 * 2048 * 5504, 0)
    assert copies(precision="fp32") == (4 * matrices, 0)
    assert copies(compute="split") == (0, 2 * matrices)
    assert copies(compute="split", precision="fp32") == (0, 0)
    # merged costs fewer FLOPs from m n / (m + n) tokens on: 1024 for the square layers, 1492.6 for the others
    assert copies(compute="auto", tokens=1493) == (2 * matrices, 0)
    assert copies(compute="auto", tokens=1025) == (2 * square, 2 * (matrices - square))
    assert copies(compute="auto", tokens=1024) == (0, 2 * matrices)
    assert copies("recompute", "auto", tokens=2049) == (2 * 2048 * 2048, 2 * (matrices - square))


def test_zero_settings_from_the_json() -> None:
    section = {"stage": 2, "reduce_bucket_size": 1000, "overlap_comm": True}
    assert zero_settings({"zero_optimization": section, "bf16": {"enabled": True}}) == Zero(2, False, 2000)
    section["contiguous_gradients"] = False
    assert zero_settings({"zero_optimization": section, "bf16": {"enabled": True}}).bucket == 0
    sums = {"zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}}
    assert zero_settings({**sums, "bf16": {"enabled": True}}).fp32_accumulation
    assert not zero_settings({**sums, "bf16": {"enabled": False}}).fp32_accumulation


@pytest.mark.parametrize(
    ("options", "world", "given", "message"),
    [
        ("--parallel.tp=2", 3, {}, r"world of 3 ranks must be a multiple"),
        ("--parallel.tp=1", 5, {}, r"global_batch_size 1536 must be a multiple of .* 12 x 5 data-parallel ranks = 60"),
        ("--parallel.tp=3", 3, {}, r"model.num_heads 32 must be a multiple of parallel.tp 3"),
        ("--parallel.tp=1", 8, {"zero_optimization": {"stage": 3}}, r"stage must be 0, 1 or 2, it is 3"),
    ],
)
def test_what_a_run_refuses_is_refused(options: str, world: int, given: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan(parsed("1.3b", "switchlora_r512", options), given, world)


def test_a_vocabulary_that_only_the_tokenizer_knows() -> None:
    config = RunConfig()
    assert "2,048 (data.vocab_size;" in plan(config, {}, 2)
    config.data.tokenizer = "char"
    with pytest.raises(UserError, match=r"does not read data.tokenizer 'char': give .* model.vocab_size"):
        plan(config, {}, 2)
    config.data.tokenizer, config.data.vocab_size = "bpe", 257
    config.model.num_heads = config.parallel.tp = 72
    config.model.num_kv_heads = None
    with pytest.raises(UserError, match=r"The vocabulary 257 over parallel.tp 72 gives shards of 4"):
        plan(config, {}, 72)


def start(arguments: str, **env: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-X", "importtime", str(ROOT / "launch" / "pretrain.py"), *arguments.split()]
    place = {"PYTHONPATH": str(ROOT), "PATH": "", "HF_HUB_OFFLINE": "1", **env}
    return subprocess.Popen(command, env=place, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_the_command_prints_once_and_imports_no_deepspeed() -> None:
    """Alone, and under a launcher that started two ranks."""
    launcher = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    files = f"--config {CONFIGS}/llama_1.3b.yaml --config {CONFIGS}/methods/switchlora_r512.yaml"
    quick = f"--config {CONFIGS}/cpu_quickstart.yaml --dry_run"
    processes = [
        start(f"{files} --dry_run --dry_run_world 32"),
        *(start(quick, RANK=rank, LOCAL_RANK=rank, **launcher) for rank in "01"),
        start(f"{files} --dry_run --dry_run_world 7"),
    ]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0, 2]
    assert "dp 32 x tp 1;" in outputs[0][0] and row(outputs[0][0], "total")[0] == 609.7
    assert "dp 2 x tp 1;" in outputs[1][0] and row(outputs[1][0], "total")[1] == 558_864
    assert outputs[2][0] == ""
    assert "error: train.global_batch_size 1536 must be a multiple of" in outputs[3][1]
    assert not [out for _, out in outputs if "deepspeed" in out or "transformers" in out or "datasets" in out]
