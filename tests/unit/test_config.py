"""Configuration and command line: values arrive, mistakes get the rule, the values and what to change."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from megatron_switchlora.config.command_line import parse_arguments
from megatron_switchlora.config.ds_config import read_ds_config, resolve_ds_config
from megatron_switchlora.config.errors import UserError
from megatron_switchlora.config.rules import unused_options, validate
from megatron_switchlora.config.run import RunConfig
from megatron_switchlora.distributed.mesh import mesh_sizes
from megatron_switchlora.run import folder as run_folder
from megatron_switchlora.run.folder import create_folder, default_folder

ISSUE_LINE = (
    "--method.name switchlora --method.rank 24 --method.switch.interval0 40 --optim.lr 0.02 --optim.dense_lr 0.02 "
    "--train.steps 600 --train.warmup_steps 50 --train.seq_len 128 --train.micro_batch_size 8 "
    "--train.global_batch_size 32 --train.seed 0 --model.hidden_size 144 --model.intermediate_size 384 "
    "--model.num_layers 4 --model.num_heads 4 --data.source files --data.files a*.json.gz --data.tokenizer char "
    "--output_dir DIR"
)


def test_options_reach_the_configuration() -> None:
    config = parse_arguments(ISSUE_LINE.split()).config
    assert (config.method.rank, config.optim.dense_lr, config.train.global_batch_size) == (24, 0.02, 32)
    assert config.data.patterns() == ["a*.json.gz"]
    assert config.output_dir == "DIR"


def test_the_start_of_a_method_is_resolved() -> None:
    """What a run writes down says how it began, whatever becomes the default later."""
    starts = {"switchlora": "switchlora", "lora": "switchlora", "relora": "classic"}
    for name, init in starts.items():
        assert parse_arguments(["--method.name", name]).config.method.init == init
    assert parse_arguments(["--method.name=relora", "--method.init=switchlora"]).config.method.init == "switchlora"


@pytest.mark.parametrize("stage", [1, 2, None])
def test_galore_needs_whole_gradients(stage: int | None) -> None:
    config = parse_arguments(["--method.name", "galore"]).config
    given = read_ds_config(None) if stage is None else {"zero_optimization": {"stage": stage}}
    with pytest.raises(UserError, match=rf"ZeRO stage {stage or 1} cuts them .* use ds_configs/zero0.json"):
        resolve_ds_config(given, config, 1)
    resolve_ds_config({"zero_optimization": {"stage": 0}}, config, 1)


def test_c4_needs_two_options() -> None:
    data = parse_arguments(["--data.source", "hf", "--data.tokenizer", "t5-base"]).config.data
    assert (data.hf_name, data.hf_config, data.max_documents) == ("allenai/c4", "en", 46_000_000)
    assert (data.hf_split, data.hf_val_split) == ("train", "validation")
    everything = "--data.source hf --data.tokenizer t5-base --data.max_documents null --data.hf_config null"
    data = parse_arguments(everything.split()).config.data
    assert (data.max_documents, data.hf_config) == (None, None)


def test_options_override_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("method:\n  rank: 8\noptim:\n  lr: 1e-3\ndata:\n  source: files\n  files: [a, b]\n")
    parsed = parse_arguments(["--config", str(path), "--method.rank", "9", "--ds_config", "x.json"])
    assert (parsed.config.method.rank, parsed.config.optim.lr, parsed.ds_config) == (9, 0.001, "x.json")
    assert parsed.config.data.patterns() == ["a", "b"]
    assert parsed.config.train.steps == RunConfig().train.steps


def test_options_win_wherever_they_stand(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("method:\n  rank: 8\n")
    assert parse_arguments(["--method.rank", "11", "--config", str(path)]).config.method.rank == 11
    assert parse_arguments(["--method.rank=11", f"--config={path}"]).config.method.rank == 11


@pytest.mark.parametrize("text", ["", "- a\n", "3\n", "method:\n", "method: [1]\n", "optim: [\n"])
def test_yaml_without_sections_names_the_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=rf"--config {re.escape(str(path))} (must hold sections|is not valid YAML)"):
        parse_arguments(["--config", str(path)])


@pytest.mark.parametrize(
    ("text", "wrong", "right"),
    [("optim:\n  lrr: 1\n", "optim.lrr", "optim.lr"), ("trainn:\n  steps: 1\n", "trainn.steps", "train.steps"),
     ("method:\n  intervall0: 3\n", "method.intervall0", "method.switch.interval0")],
)  # fmt: skip
def test_unknown_yaml_keys_name_the_nearest(tmp_path: Path, text: str, wrong: str, right: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=rf"{re.escape(wrong)}'.*did you mean '{re.escape(right)}'"):
        parse_arguments(["--config", str(path)])


def test_unknown_options_name_the_nearest() -> None:
    with pytest.raises(UserError, match=r"'train.step'.*'train.steps'"):
        parse_arguments(["--train.step", "3"])


def test_a_mistake_after_print_config_leaves_nothing_behind() -> None:
    """The parser is built once."""
    with pytest.raises(UserError, match=r"'train.step'.*'train.steps'"):
        parse_arguments(["--print_config", "--train.step", "3"])
    assert parse_arguments([]).config == parse_arguments([]).config


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model.num_heads 5", r"hidden_size 144 must be a multiple of model.num_heads 5"),
        ("--model.hidden_size 12 --method.rank 4", r"head size 3 .* must be even"),
        ("--model.num_kv_heads 0", r"num_kv_heads must be at least 1, not 0"),
        ("--model.rope_theta 0", r"model.rope_theta must be positive"),
        ("--model.initializer_range -1", r"model.initializer_range must be positive"),
        ("--model.num_kv_heads 3", r"num_heads 4 must be a multiple of model.num_kv_heads 3"),
        ("--method.rank 145", r"method.rank must be between 1 and .* 144, but it is 145"),
        ("--method.rank 40 --model.num_kv_heads 1", r"here 36, but it is 40"),
        ("--method.rank 1", r"rank 1 cannot switch"),
        ("--method.rank 144", r"rank 144 leaves nothing to switch in any matrix \(min\(m, n\) is 144 at most\)"),
        ("--method.name relora --method.relora.interval 49", r"at least train.warmup_steps.* 49 and 50"),
        (
            "--method.name relora --method.relora.interval 60 --method.relora.warmup 61",
            r"relora.warmup must be between 0 and .* 60, but it is 61",
        ),
        ("--method.name relora --method.relora.keep 0", r"relora.keep .* it is 0.*relora.moments to zero"),
        ("--method.full_rank_lr 0.1", r"full_rank_lr 0.1 belongs to method.full_rank_steps, which is 0"),
        ("--method.init pissa", r"pissa gives only method.rank vectors .* method.name lora or relora"),
        ("--optim.lora_plus_ratio 0", r"lora_plus_ratio must be positive, not 0"),
        ("--optim.lora_plus_ratio 2 --method.name full", r"ratio 2 .* method.name full has no adapters"),
        ("--optim.lora_plus_ratio 2 --method.name galore", r"method.name galore has no adapters"),
        ("--method.name galore --parallel.tp 2", r"whole gradients, but with parallel.tp 2 .* set parallel.tp to 1"),
        ("--method.name galore --train.precision bf16", r"fp32 parameters only, but train.precision is bf16"),
        ("--method.name galore --method.galore.update_gap 0", r"galore.update_gap must be at least 1, not 0"),
        ("--method.name galore --method.galore.scale 0", r"galore.scale must be positive, not 0"),
        ("--method.name galore --method.rank 145", r"method.rank must be between 1 and .* 144, but it is 145"),
        ("--method.switch.interval0 9", r"at least 2 \* method.switch.freeze_steps.* 9 and 5"),
        ("--method.switch.ratio 0", r"switch.ratio must be positive"),
        ("--train.warmup_steps 700", r"between 0 and train.steps 600; it is 700"),
        ("--train.profile 5", "train.profile must be the first and the last step to trace, as 5-7: .* it is '5'"),
        ("--train.profile 0-3", "it is '0-3'"),
        ("--train.profile 7-5", "it is '7-5'"),
        ("--train.profile 599-601", "from 1 to train.steps 600; it is '599-601'"),
        ("--train.profile 1-101", "at most 100 steps"),
        ("--train.micro_batch_size 0", r"micro_batch_size must be at least 1, not 0"),
        ("--optim.lr 0", r"optim.lr must be positive"),
        ("--optim.clip .inf", r"optim.clip must be a finite number of 32 bits, not Infinity"),
        ("--method.alpha .inf", r"method.alpha must be a finite number of 32 bits, not Infinity"),
        ("--optim.beta2 1", r"beta2 must lie in \[0, 1\)"),
        ("--parallel.tp 3", r"model.num_heads 4 must be a multiple of parallel.tp 3"),
        ("--model.num_kv_heads 1 --parallel.tp 2", r"model.num_kv_heads 1 must be a multiple of parallel.tp 2"),
        (
            "--model.intermediate_size 9 --method.rank 2 --parallel.tp 4",
            r"model.intermediate_size 9 .* shards of 3.*padding",
        ),
        ("--parallel.timeout 0.5", r"parallel.timeout must be at least 1 second, not 0.5"),
        ("--parallel.timeout .nan", r"parallel.timeout must be a finite number"),
        ("--parallel.tp 0", r"parallel.tp must be at least 1, not 0"),
        (
            "--parallel.lte_heads 4",
            r"lte_heads 4 needs method.name lte, which trains heads separately; it is switchlora",
        ),
        ("--parallel.lte_heads 0", r"lte_heads must be at least 1, not 0"),
        ("--method.lte.merge_interval 5", r"method.lte.merge_interval belongs to method.name lte, not switchlora"),
        ("--method.name lora --method.mhlora.heads 4", r"method.mhlora.heads belongs to method.name mhlora, not"),
        ("--method.name lora --method.lte.base nf4", r"method.lte.base belongs to method.name lte, not lora"),
        ("--method.name lora --method.relora.interval 7", r"method.relora.interval belongs to method.name relora"),
        ("--method.galore.scale 0.5", r"method.galore.scale belongs to method.name galore, not switchlora"),
        (
            "--method.name lte --method.lte.base nf4 --method.compute merged",
            r"shared \(method.lte.local_heads 1\) or quantised \(method.lte.base nf4\)",
        ),
        (
            "--method.name lte --method.lte.merge_interval 0",
            r"merge_interval must be at least 1 step, or never, but it is 0",
        ),
        ("--method.name lte --method.lte.merge_interval often", r"merge_interval"),
        ("--method.name lte --method.alpha -1", r"alpha must be positive, not -1"),
        ("--method.name lte --method.lte.local_heads 0", r"local_heads must be at least 1, not 0"),
        (
            "--method.name lte --method.lte.local_heads 3",
            r"micro_batch_size 8 must be a multiple of method.lte.local_heads 3",
        ),
        ("--method.name lte --parallel.lte_heads 3", r"global_batch_size 32 must be a multiple of the 3 LTE heads"),
        (
            "--method.name lte --method.lte.merge_form reset --method.init switchlora",
            r"reset needs B = 0 and one W",
        ),
        ("--method.name lte --method.lte.redraw_A true", r"redraw_A true needs method.lte.merge_form reset"),
        (
            "--method.name lte --method.lte.local_heads 2 --method.compute merged",
            r"\(method.lte.local_heads 2\) or quantised",
        ),
        (
            "--method.name lte --method.lte.base nf4 --parallel.tp 2",
            r"nf4 with parallel.tp 2 needs sizes .*hidden_size 144",
        ),
        ("--method.name lte --method.lte.inner switchlora --method.lte.local_heads 2", r"rewrites each head's own W"),
        (
            "--method.name lte --method.lte.inner switchlora --method.lte.merge_form reset",
            r"inner switchlora changes the weights.*merge_form is reset",
        ),
        ("--method.name lte --method.init pissa", r"pissa gives every head of method.name lte the same vectors"),
        ("--method.name mhlora --method.init pissa", r"pissa gives every head of method.name mhlora"),
        (
            "--method.name mhlora --method.lte.merge_interval 3",
            r"merge_interval belongs to method.name lte, not mhlora",
        ),
        (
            "--method.name relora --method.init lora_ga",
            r"method.name relora takes method.init .*, not lora_ga",
        ),
        ("--method.name full --method.full_rank_steps 9", r"full trains at full rank throughout"),
        ("--method.full_rank_steps 999999", r"full_rank_steps 999999 of train.steps .* must leave the method"),
        ("--method.full_rank_steps -1", r"full_rank_steps must not be negative, it is -1"),
        ("--method.name lte --method.lte.inner switchlora --method.lte.base nf4", r"rewrites each head's own W"),
        (
            "--method.name lte --method.lte.inner switchlora --method.lte.merge_traffic factors",
            r"must not send factors",
        ),
        ("--method.init semi_orthogonal", r"semi_orthogonal gives the vectors of one adapter"),
        ("--data.source files", r"needs data.files"),
        ("--data.files x", r"belong to data.source files"),
        ("--data.source hf --data.files x --data.tokenizer t5-base", r"belong to data.source files, not hf"),
        ("--data.source hf", r"data.source hf keeps no text to build a bpe tokenizer from.*t5-base"),
        ("--data.source hf --data.tokenizer a --data.hf_split validation", r"are both 'validation'"),
        ("--data.source hf --data.tokenizer a --data.max_documents 0", r"max_documents must be at least 1 or null"),
        ("--data.hf_name a --data.hf_split b", r"data.hf_name, data.hf_split belong to data.source hf.*leave them out"),
        ("--data.hf_nam a", r"data.hf_nam'.*did you mean 'data.hf_name'"),
        ("--data.vocab_size 100", r"between 257 "),
        ("--method.name lorra", r"method.name"),
        ("--train.steps many", r"train.steps"),
        ("--config /nowhere/x.yaml", r"/nowhere/x.yaml"),
        ("stray", r"stray"),
        ("--dry_run_world 8", r"--dry_run_world 8 .* give --dry_run too"),
        ("--dry_run --dry_run_world 0", r"--dry_run_world must be at least 1, not 0"),
        ("--dry_run --evaluate_only", r"give one of them"),
        ("--prepare_only --dry_run", r"give one of them"),
    ],
)
def test_refusals(arguments: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_arguments(arguments.split())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"zero_optimization": {"stage": 3}}, r"stage must be 0, 1 or 2, it is 3.*zero2.json"),
        ({"optimizer": {"type": "AdamW"}}, r"sets 'optimizer'"),
        ({"scheduler": {"type": "WarmupLR"}}, r"sets 'scheduler'"),
        ({"fp16": {"enabled": True}}, r"enables 'fp16'"),
        ({"zero_optimization": {"stage": 1, "round_robin_gradients": True}}, r"round_robin_gradients"),
        (
            {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}},
            r"offload_optimizer to 'cpu'",
        ),
        ({"train_batch_size": 64}, r"train_batch_size to 64, .* sets 32 \(train.global_batch_size\)"),
        ({"train_micro_batch_size_per_gpu": 4}, r"to 4, .* sets 8 \(train.micro_batch_size\)"),
        ({"gradient_accumulation_steps": 4}, r"to 4, .* sets 2"),
        ({"gradient_clipping": 0.5}, r"gradient_clipping to 0.5, .* sets 1.0 \(optim.clip\)"),
        ({"bf16": {"enabled": True}}, r"bf16.enabled to True, but train.precision is 'fp32'"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, r"grad_accum_dtype 'bf16' does not go with"),
        ({"zero_optimization": [1]}, r"must be an object"),
        ({"bf16": True}, r"bf16 must be an object"),
        ({"data_types": "fp32"}, r"data_types must be an object"),
        ({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, r"sets 'torch_autocast'"),
        ({"bf16": {"bf16_optimizer_states": True}}, r"sets bf16.bf16_optimizer_states"),
        ({"zero_optimization": {"stage": 1, "cpu_offload": True}}, r"sets zero_optimization.cpu_offload"),
        ({"zero_optimization": {"stage": 1, "offload_optimizer": "cpu"}}, r"offload_optimizer to 'cpu'"),
        ({"communication_data_type": "fp16"}, r"sets 'communication_data_type'"),
        ({"train_batch_sise": 32}, r"sets 'train_batch_sise', which is unknown"),
    ],
)
def test_contradicting_deepspeed_json(given: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve_ds_config(given, RunConfig(), dp=2)


def test_deepspeed_json_is_filled_in() -> None:
    given = {
        "zero_optimization": {"stage": 2},
        "train_batch_size": "auto",
        "gradient_clipping": 1.0,
        "comms_logger": {"enabled": True},
    }
    resolved = resolve_ds_config(given, RunConfig(), dp=4)
    assert resolved["train_batch_size"] == 32
    assert resolved["gradient_accumulation_steps"] == 1
    assert resolved["bf16"] == {"enabled": False}
    assert resolved["comms_logger"] == {"enabled": True}
    assert given["train_batch_size"] == "auto"


@pytest.mark.parametrize("text", ["{", "[1]", None])
def test_unreadable_deepspeed_json(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "ds.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=re.escape(str(path))):
        read_ds_config(str(path))


def test_batch_that_does_not_split() -> None:
    with pytest.raises(
        UserError, match=r"global_batch_size 32 must be a multiple of .* 8 x 3 data-parallel ranks = 24"
    ):
        resolve_ds_config({}, RunConfig(), dp=3)


def test_world_that_does_not_fit_the_mesh() -> None:
    config = RunConfig()
    config.parallel.tp = 2
    with pytest.raises(UserError, match=r"world of 3 ranks must be a multiple"):
        mesh_sizes(config.parallel, 3)
    config.parallel.lte_heads = 3
    with pytest.raises(UserError, match=r"world of 8 ranks must be a multiple of .*lte_heads 3"):
        mesh_sizes(config.parallel, 8)


def test_used_output_folder_is_refused(tmp_path: Path) -> None:
    assert create_folder(tmp_path / "new" / "run") == tmp_path / "new" / "run"
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"already holds a run \(metrics.jsonl\)"):
        create_folder(tmp_path)
    with pytest.raises(UserError, match=r"cannot be made: .*metrics.jsonl is not a folder"):
        create_folder(tmp_path / "metrics.jsonl" / "below")


def test_two_runs_never_share_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folders = {default_folder("full") for _ in range(5)}
    assert len(folders) == 5
    monkeypatch.setattr(run_folder, "refuse_folder", lambda folder: None)  # both looked before either came
    with pytest.raises(UserError, match="was just taken by another run"):
        create_folder(next(iter(folders)))


@pytest.mark.parametrize(
    ("words", "unused"),
    [
        ("", []),
        ("--method.name full --method.rank 8", ["method.rank"]),
        (
            "--method.name full --method.init pissa --method.alpha 3 --method.switch.interval0 9",
            ["method.alpha", "method.init", "method.switch.interval0"],
        ),
        ("--method.name galore --method.rslora true --method.compute split", ["method.rslora", "method.compute"]),
        (
            "--method.name lora --method.switch.freeze_steps 3 --method.switch.bank_spread dp",
            ["method.switch.freeze_steps", "method.switch.bank_spread"],
        ),
        ("--method.name lte --method.switch.selection random", ["method.switch.selection"]),
        ("--method.name lte --method.switch.selection random --method.lte.inner switchlora", []),
        ("--method.name lte --method.orthogonal_scale sqrt_r_n", []),
        ("--method.name lte --method.init classic --method.orthogonal_scale sqrt_r_n", ["method.orthogonal_scale"]),
        (
            "--method.name lte --method.lte.merge_form reset --method.lte.redraw_A true "
            "--method.lte.merge_interval never",
            ["method.lte.redraw_A"],
        ),
        ("--method.name lte --method.lte.local_heads 2 --method.merged_cache recompute", ["method.merged_cache"]),
        ("--method.name relora --method.init classic", []),
    ],
)
def test_options_without_effect_are_known(words: str, unused: list[str]) -> None:
    assert unused_options(parse_arguments(words.split()).config.method) == unused


def test_shipped_files_load() -> None:
    root = Path(__file__).resolve().parents[2]
    yamls, jsons = sorted((root / "launch" / "configs").glob("*.yaml")), sorted((root / "ds_configs").glob("*.json"))
    assert yamls and len(jsons) >= 4
    for path in yamls:
        config = parse_arguments(["--config", str(path)]).config
        validate(config)
        assert not unused_options(config.method), path
        for ds_path in jsons:
            config.train.precision = "bf16" if "fp32_accum" in ds_path.name else "fp32"
            resolved = resolve_ds_config(read_ds_config(str(ds_path)), config, dp=2)
            json.dumps(resolved)
