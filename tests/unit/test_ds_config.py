"""DeepSpeed's JSON: every key has its type and range, for a dry run as for a run; no secret is let in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_switchlora.config.ds_config import (
    for_deepspeed,
    leaves_norm_to_us,
    read_ds_config,
    resolve_ds_config,
    zero_settings,
)
from megatron_switchlora.config.ds_keys import SCALARS, SECTIONS, Kind
from megatron_switchlora.config.errors import UserError
from megatron_switchlora.config.log import LogConfig
from megatron_switchlora.config.run import RunConfig
from megatron_switchlora.planning.dry_run import plan
from megatron_switchlora.startup.loggers import check_loggers

KEYS = {(None, name): kind for name, kind in SCALARS.items()}
KEYS |= {(section, name): kind for section, kinds in SECTIONS.items() for name, kind in kinds.items()}


def written(tmp_path: Path, text: str) -> str:
    (tmp_path / "ds.json").write_text(text)
    return str(tmp_path / "ds.json")


def holding(key: tuple[str | None, str], value: Any) -> dict[str, Any]:
    section, name = key
    return {name: value} if section is None else {section: {name: value}}


@pytest.mark.parametrize("key", KEYS, ids=lambda key: ".".join(filter(None, key)))
def test_values_of_another_kind(tmp_path: Path, key: tuple[str | None, str]) -> None:
    """The same sentence from the file, for the run and for the plan."""
    kind: Kind = KEYS[key]
    values: list[Any] = [[1], "a\0b", float("nan"), float("inf"), 10**30]
    values += [] if bool in kind.types else [True]
    values += [] if str in kind.types and not kind.choices else ["5e8", "true"]
    values += [] if kind.types == (str,) else [-5]
    values += [] if kind.auto or str in kind.types else ["auto"]
    values += [] if kind.null else [None]
    for value in values:
        given = holding(key, value)
        with pytest.raises(UserError, match=rf"{key[1]}.* in the DeepSpeed JSON") as of_file:
            read_ds_config(written(tmp_path, json.dumps(given)))
        for act in (lambda g=given: resolve_ds_config(g, RunConfig(), 2), lambda g=given: plan(RunConfig(), g, 2)):
            with pytest.raises(UserError) as raised:
                act()
            assert str(raised.value) == str(of_file.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            '{"zero_optimization": {"stage": 1, "reduce_bucket_size": 0}}',
            'must be a whole number from 1 or "auto", not 0',
        ),
        ('{"zero_optimization": {"reduce_bucket_size": -5}}', 'whole number from 1 or "auto", not -5'),
        ('{"zero_optimization": {"reduce_bucket_size": "5e8"}}', "not '5e8'"),
        (
            '{"zero_optimization": {"allgather_bucket_size": 1.5}}',
            "allgather_bucket_size .* not 1.5",
        ),
        ('{"zero_optimization": {"stage": "auto"}}', "stage in the DeepSpeed JSON must be a whole number from 0"),
        (
            '{"steps_per_print": 0}',
            "steps_per_print .* whole number from 1 or null, not 0",
        ),
        ('{"fp16": {"enabled": "yes"}}', "fp16.enabled in the DeepSpeed JSON must be true or false"),
        ('{"gradient_predivide_factor": 0}', "must be a number above 0, not 0"),
        ('{"zero_optimization": {"stage": 2}, "gradient_predivide_factor": 2}', "do not go with ZeRO stage 2"),
        ('{"zero_optimization": {"stage": 2}, "prescale_gradients": true}', "do not go with ZeRO stage 2"),
        ('{"comms_logger": {"prof_ops": [1]}}', "prof_ops in the DeepSpeed JSON must be a list of strings"),
        ('{"fp16": {}, "fp16": {}}', "ds.json is not valid JSON: 'fp16' occurs twice"),
        ('{"zero_optimization": {"stage": 1, "stage": 2}}', "'stage' occurs twice"),
        ("[" * 100_000, "is not valid JSON: it is nested too deeply"),
        ('{"flops_profiler": {"output_file": "~nobody-here/x"}}', "home folder that this machine does not know"),
    ],
)
def test_what_is_refused(tmp_path: Path, given: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve_ds_config(read_ds_config(written(tmp_path, given)), RunConfig(), 2)


@pytest.mark.parametrize(
    ("given", "resolved"),
    [
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": 5e6}}, {"stage": 2, "reduce_bucket_size": 5_000_000}),
        ({"zero_optimization": {"stage": 1.0, "reduce_bucket_size": "auto"}}, {"stage": 1}),
        ({"zero_optimization": {"overlap_comm": None, "reduce_scatter": "auto"}}, {}),
        ({"zero_optimization": {"offload_param": None, "offload_optimizer": {"device": "none", "odd": 1}}}, {}),
    ],
)
def test_what_is_resolved(tmp_path: Path, given: dict[str, Any], resolved: dict[str, Any]) -> None:
    """ "auto" is DeepSpeed's default; what the plan reads is what the run reads."""
    read = read_ds_config(written(tmp_path, json.dumps(given)))
    found = resolve_ds_config(read, RunConfig(), 2)
    assert found == resolve_ds_config(given, RunConfig(), 2)
    assert found["zero_optimization"] == resolved
    whole = isinstance(resolved.get("reduce_bucket_size", 1), int)
    assert whole and zero_settings(found).bucket == resolved.get("reduce_bucket_size", 500_000_000)
    assert f"ZeRO stage {resolved.get('stage', 0)}" in plan(RunConfig(), read, 2)


def test_deepspeed_does_not_wait_for_the_device_to_time_it(tmp_path: Path) -> None:
    """Unless asked to; what is resolved can be given again."""
    off = {"throughput": {"enabled": False}}
    found = resolve_ds_config({}, RunConfig(), 2)
    assert found["timers"] == off == resolve_ds_config(found, RunConfig(), 2)["timers"]
    on = {"throughput": {"enabled": True, "synchronized": False}}
    assert (
        resolve_ds_config(read_ds_config(written(tmp_path, json.dumps({"timers": on}))), RunConfig(), 2)["timers"] == on
    )
    for wrong in ({"enabled": 1}, {"odd": True}):
        with pytest.raises(UserError, match=r"timers.throughput in the DeepSpeed JSON has enabled and synchronized"):
            resolve_ds_config({"timers": {"throughput": wrong}}, RunConfig(), 2)


@pytest.mark.parametrize(
    ("given", "ours"),
    [
        ({"zero_optimization": {"stage": 0}}, False),
        ({"zero_optimization": {"stage": 1, "reduce_bucket_size": 1000}}, True),
        ({"zero_optimization": {"stage": 2}}, True),
        ({"zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}}, False),
    ],
)
def test_deepspeed_leaves_the_norm_to_the_engine(given: dict[str, Any], ours: bool) -> None:
    config = RunConfig()
    config.train.precision = "bf16"
    resolved = resolve_ds_config(given, config, 2)
    found = for_deepspeed(resolved)
    assert leaves_norm_to_us(resolved) == ours and resolved["gradient_clipping"] == 1.0
    assert found["gradient_clipping"] == (0.0 if ours else 1.0)
    assert found["bf16"].get("check_grad_overflow", True) != ours
    assert found["zero_optimization"].get("compute_grad_norm", True) != ours
    assert given["zero_optimization"].items() <= found["zero_optimization"].items()


def test_auto_is_what_the_run_configuration_says() -> None:
    given = {name: "auto" for name, kind in SCALARS.items() if kind.auto}
    given |= {name: {"enabled": "auto"} for name in ("bf16", "fp16", "amp")}
    assert {"train_batch_size", "gradient_clipping", "bf16"} <= given.keys()
    resolved = resolve_ds_config(given, RunConfig(), 2)
    assert resolved == resolve_ds_config({}, RunConfig(), 2) | {"fp16": {}, "amp": {}}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bf16": {"API-Key": "s3"}}, r"has bf16.API-Key, .* remove it\.$"),
        ({"comms_logger": {"auth_token": "s3"}}, "has comms_logger.auth_token,"),
        ({"password": "s3"}, "has password,"),
        ({"zero_optimization": {"offload_param": {"secret": "s3"}}}, "has zero_optimization.offload_param.secret"),
    ],
)  # fmt: skip
def test_secrets_are_refused_and_not_repeated(tmp_path: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        read_ds_config(written(tmp_path, json.dumps(given)))
    assert "s3" not in str(raised.value)


def test_a_profile_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "x" / "y", tmp_path / ("x" * 300) / "y", Path("/proc/none/y")):
        profiler: dict[str, Any] = {"enabled": True, "output_file": str(path)}
        with pytest.raises(UserError, match=r"flops_profiler.output_file in the DeepSpeed JSON: .* cannot be made"):
            check_loggers(LogConfig(), {"flops_profiler": profiler})
        check_loggers(LogConfig(), {"flops_profiler": profiler | {"enabled": False}})
    check_loggers(LogConfig(), {"flops_profiler": profiler | {"output_file": str(tmp_path / "new" / "x")}})
    assert not (tmp_path / "new").exists()


def test_home_is_expanded_in_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    written(tmp_path, '{"flops_profiler": {"output_file": "~/flops"}}')
    assert read_ds_config("~/ds.json") == {"flops_profiler": {"output_file": f"{tmp_path}/flops"}}


@pytest.mark.parametrize(
    ("monitor", "instead"),
    [
        ("tensorboard", "set log.tensorboard to true"),
        ("wandb", "set log.wandb to offline or online, with the key in WANDB_API_KEY"),
        ("csv_monitor", "read metrics.jsonl"),
        ("comet", "set log.tensorboard or log.wandb"),
    ],
)
def test_monitors_are_refused_by_name(tmp_path: Path, monitor: str, instead: str) -> None:
    """Whatever they hold, a secret too; the sentence gives what to do instead."""
    for content in ({"enabled": True}, {"enabled": False}, {"api_key": "s3"}, []):
        with pytest.raises(UserError, match=f"a section '{monitor}', but .* owns logging: remove it, and {instead}"):
            read_ds_config(written(tmp_path, json.dumps({"zero_optimization": {"stage": 1}, monitor: content})))
