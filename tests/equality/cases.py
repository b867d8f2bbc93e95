"""The cases in which two commits are compared: a covering array of what a run can be made of, as option words."""

from __future__ import annotations

import itertools
from typing import Any

from tests.equality.covering import Row, covering_array

FACTORS: dict[str, list[Any]] = {
    "method": ["full", "lora", "relora", "switchlora", "lte", "lte_switchlora", "mhlora", "galore"],
    "init": ["none", "switchlora", "classic", "pissa", "lora_ga", "semi_orthogonal"],
    "zero": ["zero0", "zero1", "zero1_fp32_accum", "zero2"],
    "tp": [1, 2],
    "dp": [1, 2],
    "precision": ["fp32", "bf16"],
    "resumed": [False, True],
}
INITS = {  # that a method takes
    "full": {"none"}, "galore": {"none"},
    "lora": {"switchlora", "classic", "pissa", "lora_ga", "semi_orthogonal"},
    "relora": {"switchlora", "classic", "pissa", "semi_orthogonal"},
    "switchlora": {"switchlora", "classic", "lora_ga"},
    "lte": {"switchlora", "classic", "lora_ga", "semi_orthogonal"},
    "lte_switchlora": {"switchlora", "classic", "lora_ga"},
    "mhlora": {"switchlora", "classic", "semi_orthogonal"},
}  # fmt: skip
METHODS: dict[str, dict[str, Any]] = {
    "full": {"method.name": "full", "optim.lr": 0.001},
    "lora": {"method.name": "lora"},
    "relora": {"method.name": "relora", "method.relora.interval": 4, "method.relora.warmup": 2},
    "switchlora": {"method.name": "switchlora", "method.switch.interval0": 4, "method.switch.freeze_steps": 2},
    "lte": {"method.name": "lte", "method.lte.local_heads": 2, "method.lte.merge_interval": 3, "method.alpha": 4},
    "lte_switchlora": {
        "method.name": "lte", "method.lte.inner": "switchlora", "method.lte.merge_interval": 3,
        "method.switch.interval0": 4, "method.switch.freeze_steps": 2, "parallel.lte_heads": 2,
    },
    "mhlora": {"method.name": "mhlora", "method.mhlora.heads": 2, "method.alpha": 4},
    "galore": {"method.name": "galore", "method.galore.update_gap": 4},
}  # fmt: skip
SHARED: dict[str, Any] = {
    "model.hidden_size": 32, "model.intermediate_size": 48, "model.num_layers": 2, "model.num_heads": 2,
    "train.steps": 10, "train.warmup_steps": 2, "train.seq_len": 32, "train.micro_batch_size": 2,
    "train.global_batch_size": 8, "train.eval_interval": 5, "train.eval_samples": 16, "train.threads": 1,
    "train.device": "cpu", "optim.lr": 0.01, "optim.dense_lr": 0.005, "data.source": "files", "data.tokenizer": "bpe",
    "data.vocab_size": 300, "checkpoint.interval": 5, "model.pad_multiple": 1,
}  # fmt: skip
# One of these is added to every row in turn, where the method reads it.
VARIANTS: list[tuple[set[str], dict[str, Any]]] = [
    (set(METHODS), {}),
    (set(METHODS), {"train.activation_checkpointing": True}),
    (set(METHODS) - {"full"}, {"method.full_rank_steps": 3}),
    ({"switchlora", "lte_switchlora"}, {"method.switch.bank_device": "host", "method.switch.bank_spread": "dp"}),
    ({"lora", "relora", "switchlora", "lte", "mhlora"}, {"method.compute": "split", "optim.lora_plus_ratio": 2.0}),
    ({"lora", "relora", "switchlora", "mhlora"}, {"method.merged_cache": "accumulation", "method.rslora": True}),
    ({"switchlora"}, {"method.switch.selection": "independent", "method.switch.ratio": 1.0}),
    (set(METHODS), {"model.num_kv_heads": 2, "model.tie_embeddings": True, "optim.weight_decay": 0.1}),
    ({"lte"}, {"method.lte.merge_traffic": "delta", "method.alpha": 2}),
    ({"lte"}, {"method.lte.base": "nf4", "model.hidden_size": 128, "model.intermediate_size": 128}),
]


def valid(row: Row) -> bool:
    """Return whether the package takes such a run, on at most four ranks."""
    method = row["method"]
    heads = 2 if method == "lte_switchlora" else 1
    return (
        row["init"] in INITS[method]
        and row["tp"] * row["dp"] * heads <= 4
        and (row["zero"] != "zero1_fp32_accum" or row["precision"] == "bf16")
        and (method != "galore" or (row["zero"], row["tp"], row["precision"]) == ("zero0", 1, "fp32"))
    )


def rows() -> list[Row]:
    """Return the covering array; the rows of a method get its variants in turn, those for few methods first."""
    made = covering_array(FACTORS, valid)
    for method in METHODS:
        fitting = [options for methods, options in sorted(VARIANTS, key=lambda it: len(it[0])) if method in methods]
        own = [row for row in made if row["method"] == method]
        for row, variant in zip(own, itertools.cycle(fitting), strict=False):
            row["variant"] = variant
    return made


def name_of(row: Row) -> str:
    """Return a short name for tables and folders."""
    words = [row["method"], row["init"], row["zero"], f"tp{row['tp']}", f"dp{row['dp']}", row["precision"]]
    return "-".join([*words, *(["resumed"] if row["resumed"] else [])])


def world_of(row: Row) -> int:
    return row["tp"] * row["dp"] * (2 if row["method"] == "lte_switchlora" else 1)


def options_of(row: Row) -> dict[str, Any]:
    """Return all options of a row but for its places."""
    options = SHARED | METHODS[row["method"]] | {"parallel.tp": row["tp"], "train.precision": row["precision"]}
    if row["method"] != "full":
        options["method.rank"] = 6
    if row["init"] != "none":
        options["method.init"] = row["init"]
    options |= row["variant"]
    if row["init"] == "lora_ga":
        options |= {"method.rslora": True, "method.ga.samples": 8}
    return options
