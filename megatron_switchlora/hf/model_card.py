"""Write the model card of an export: README.md with the Hugging Face Hub's YAML at its head.

It states what was trained on which data, how, and with which result, from the run's configuration, meta.json and
records. What is not known is left out, the licence always. A card that a user has written or edited is kept: the last
line of a generated card holds a digest of the others.
"""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Optional

import yaml

from megatron_switchlora.checkpoint.files import Checkpoint
from megatron_switchlora.checkpoint.weights import Weights, run_of
from megatron_switchlora.config.data import DataConfig
from megatron_switchlora.config.facts import walk
from megatron_switchlora.config.model import ModelConfig
from megatron_switchlora.config.rules import unread_options
from megatron_switchlora.config.run import RunConfig
from megatron_switchlora.model.protocol import family_of
from megatron_switchlora.run.folder import read_meta
from megatron_switchlora.run.metrics_log import perplexity, read_records

NAME = "README.md"
Part = Literal["model", "base", "adapter"]
MADE = re.compile(rb"<!-- Made by megatron_switchlora, sha256 ([0-9a-f]{64})\. An edited card is kept\. -->\n")
USE = {
    "model": """from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")
model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")
""",
    "adapter": """from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("THIS_FOLDER/../base")
model = PeftModel.from_pretrained(base, "THIS_FOLDER")
""",
}
USE["base"] = USE["model"]


@dataclass(frozen=True)
class CardFacts:
    """What a card states."""

    name: str
    """The run's name."""
    model: ModelConfig
    vocab_size: int
    config: Optional[RunConfig]
    """The run's configuration; None for an import that was not trained here."""
    step: int
    val_loss: Optional[float]
    """The validation loss after that step, if it was measured."""
    meta: dict[str, Any] = field(default_factory=dict)
    """Of the run's meta.json what is known."""
    source: Optional[str] = None
    """The Hugging Face folder from which the weights were imported."""


def card_facts(weights: Weights, checkpoint: Checkpoint) -> CardFacts:
    """Collect the facts of a checkpoint: from itself, and from its run's folder if it lies there."""
    run = run_of(checkpoint.folder)
    known = {key: weights.state[key] for key in ("versions", "data") if key in weights.state}
    records = read_records(run / "metrics.jsonl")
    losses = [record["val_loss"] for record in records if "val_loss" in record and record["step"] == checkpoint.step]
    return CardFacts(
        name=run.absolute().name,
        model=weights.model,
        vocab_size=weights.vocab_size,
        config=weights.run_config(),
        step=checkpoint.step,
        val_loss=losses[-1] if losses else None,
        meta=known | read_meta(run),
        source=weights.imported.get("source"),
    )


def hub_name(source: Optional[str]) -> Optional[str]:
    """Return the Hub's name of a model's folder in its cache, or None."""
    found = re.search(r"(?:^|/)models--(?:([\w.-]+?)--)?([\w.-]+)/snapshots/[^/]+/*$", source or "")
    return "/".join(filter(None, found.groups())) if found else None


def _names_dataset(name: str) -> bool:
    """Return whether a data set's name is one of the Hub's, not that of a folder here or on another machine."""
    return re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) is not None and not Path(name).exists()


def _number(value: object) -> Optional[float]:
    """Return a finite number of meta.json, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return value if math.isfinite(value) else None


def _before_method(facts: CardFacts) -> bool:
    """Return whether only the full-rank steps before the method have trained the weights."""
    return facts.config is not None and 0 < facts.step <= facts.config.method.full_rank_steps


def model_card(facts: CardFacts, part: Part = "model") -> str:
    """Return the text of a card."""
    family, config = family_of(facts.model), facts.config
    head: dict[str, Any] = {"library_name": "peft" if part == "adapter" else "transformers"}
    head["pipeline_tag"] = "text-generation"
    if hub_name(facts.source):
        head["base_model"] = hub_name(facts.source)
    if config is not None and config.data.source == "hf" and _names_dataset(config.data.hf_name):
        head["datasets"] = [config.data.hf_name]
    kinds = ([config.method.name] if config and not _before_method(facts) else []) + (
        ["lora"] if part == "adapter" else []
    )
    head["tags"] = list(dict.fromkeys([*family.model_types, "megatron_switchlora", *kinds]))
    lines = ["---", yaml.safe_dump(head, sort_keys=False).rstrip(), "---", "", f"# {_cell(facts.name)}", ""]
    lines += [_summary(facts, family.title, part), ""]
    if config is not None:
        lines += ["## Training", "", *_table(_training(facts, config)), ""]
        lines += ["## Result", "", *_result(facts, config), ""]
    lines += ["## Use", "", f"```python\n{USE[part]}```", "", "## Before you publish", ""]
    lines += ["Add `license:` and `language:` to the head of this file. Paths of data are as the run was given them."]
    if facts.meta.get("versions"):
        versions = {key: value for key, value in facts.meta["versions"].items() if value and key != "platform"}
        lines += ["", f"Made with {', '.join(f'{key} {value}' for key, value in versions.items())}."]
    text = ("\n".join(lines) + "\n").encode(errors="replace").decode()  # a name may hold bytes that are not UTF-8
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f"{text}\n<!-- Made by megatron_switchlora, sha256 {digest}. An edited card is kept. -->\n"


def edited_card(path: Path) -> Optional[bytes]:
    """Return the content of a card that a user has written or edited, or None."""
    if path.is_symlink() or not path.is_file():
        return None
    content = path.read_bytes()
    made = MADE.search(content)
    if made is None or made.end() != len(content):
        return content
    others = content[: made.start() - 1]  # without the empty line between
    return None if hashlib.sha256(others).hexdigest().encode() == made[1] else content


def write_card(folder: Path, text: str, before: Optional[Path] = None) -> None:
    """Write a card to a folder; with an edited card in the folder `before`, which this one replaces, that one."""
    kept = edited_card(before / NAME) if before else None
    (folder / NAME).write_bytes(text.encode() if kept is None else kept)


def _line(text: object) -> str:
    """Return a text without line breaks."""
    return " ".join(str(text).split())


def _cell(text: object) -> str:
    """Return a text for a cell of a table."""
    return _line(text).replace("|", "\\|")


def _table(rows: dict[str, object]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {_cell(name)} | {_cell(value)} |" for name, value in rows.items())]


def _summary(facts: CardFacts, title: str, part: Part) -> str:
    count = _number(facts.meta.get("parameters", {}).get("full_rank"))
    size = f" of {count / 1e6:.2f} M parameters" if count else ""
    origin = f" from the weights of `{hub_name(facts.source) or _line(facts.source)}`" if facts.source else ""
    made = "imported" if facts.config is None else f"trained with {facts.config.method.facts.title}"
    if facts.config is not None and _before_method(facts):
        method = facts.config.method
        made = f"trained at full rank, before {method.facts.title} begins at step {method.full_rank_steps}"
    which = {
        "model": "",
        "base": " This is the frozen base, without the adapter in `../adapter`.",
        "adapter": " This is the adapter of the base in `../base`.",
    }
    return f"A {title}{size}, {made}{origin}.{which[part]}"


def _training(facts: CardFacts, config: RunConfig) -> dict[str, object]:
    train, parameters = config.train, facts.meta.get("parameters", {})
    unread = unread_options(config.method)
    unread += ["method.name", *(["method.full_rank_lr"] if not config.method.full_rank_steps else [])]
    sections = () if config.method.init == "lora_ga" else ("ga.",)
    read = {
        f"method.{name}": value
        for name, option, value in walk(config.method)
        if value and option.metadata["results"] and f"method.{name}" not in unread and not name.startswith(sections)
    }
    rows: dict[str, object] = {"Method": config.method.facts.title}
    rows |= {"Its options": ", ".join(f"`{name}` {value}" for name, value in read.items())} if read else {}
    trainable, full_rank = _number(parameters.get("trainable")), _number(parameters.get("full_rank"))
    if _before_method(facts):
        border = config.method.full_rank_steps
        rows["Trainable parameters"] = f"all, until {config.method.facts.title} begins after step {border}"
    elif trainable is not None and full_rank is not None:
        heads = f", in each of {config.heads} heads" if config.heads > 1 else ""
        rows["Trainable parameters"] = f"{trainable:,} of {full_rank:,}{heads}"
    tokens = train.global_batch_size * train.seq_len
    rows |= {
        "Steps": f"{facts.step:,} of {train.steps:,}",
        "Tokens": f"{facts.step * tokens:,}",
        "Batch": f"{train.global_batch_size} samples of {train.seq_len} tokens",
        "Peak learning rates": f"{config.lr:g}, dense tensors {config.dense_lr:g}",
        "Schedule": f"{train.warmup_steps} steps of warm-up, then the method's, by default a cosine to zero",
        "Precision": train.precision,
        "Seed": train.seed,
        "Started from": _beginning(facts, config),
        "Data": _data(config.data),
        "Vocabulary": f"{facts.vocab_size:,} (tokenizer `{config.data.tokenizer}`)",
    }
    return rows


def _beginning(facts: CardFacts, config: RunConfig) -> str:
    start = config.train.init_from
    imported = f"the weights of `{hub_name(facts.source) or facts.source}`, imported from Hugging Face's format"
    if facts.source:
        return imported + (f" (`{start}`)" if start else "")
    return f"the weights of `{start}`" if start else "random initial values"


def _data(data: DataConfig) -> str:
    if data.source == "hf":
        name = f"`{data.hf_name}`" + (f", {data.hf_config}" if data.hf_config else "")
        return f"{name}, split {data.hf_split}, validation on {data.hf_val_split}"
    if data.source == "stdlib":
        return f"the sources of Python's standard library, at most {data.max_bytes:,} bytes"
    held = data.patterns(validation=True)
    validation = f"validation on {_listed(held)}" if held else f"{data.val_fraction:.0%} of the text held out"
    return f"{_listed(data.patterns())}; {validation}"


def _listed(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _result(facts: CardFacts, config: RunConfig) -> list[str]:
    if facts.val_loss is None:
        return [f"No validation loss was measured after step {facts.step:,}."]
    meta = facts.meta
    unigram, held = _number(meta.get("unigram_val_ppl")), _number(meta.get("val_samples"))
    rows: dict[str, object] = {
        "Validation loss": f"{facts.val_loss:.4f} nats per token",
        "Validation perplexity": f"{perplexity(facts.val_loss):.2f}",
    }
    if unigram is not None:
        rows["Perplexity of a unigram model of the training tokens"] = f"{unigram:.2f}"
    if held is not None:
        samples = min(held, config.train.eval_samples or held)
        rows["Validation samples"] = f"{samples:,} of {config.train.seq_len} tokens"
    if meta.get("data"):
        rows["Fingerprint of the tokens"] = f"`{meta['data']}`"
    return _table(rows)
