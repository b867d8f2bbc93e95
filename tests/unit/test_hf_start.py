"""A Hugging Face folder as a starting point: what comes along, adapters merged into their base, what is refused."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from megatron_switchlora.checkpoint.files import open_checkpoint, verified
from megatron_switchlora.checkpoint.weights import Weights
from megatron_switchlora.config.errors import UserError
from megatron_switchlora.data.hf_tokenizer import tokenizer_files
from megatron_switchlora.hf.convert import import_, parse
from megatron_switchlora.hf.export import export_dense
from megatron_switchlora.hf.folders import joined_marks
from megatron_switchlora.hf.start import import_model
from tests.hf_folders import save
from tests.hf_tokenizers import TEMPLATES, llama_like, sentencepiece_only

UP, HEAD = "model.layers.1.mlp.up_proj", "lm_head"


def adapter(folder: Path, base: Path, **changes: Any) -> dict[str, torch.Tensor]:
    """Save a LoRA with values over a base; returns what PEFT merges. With the head's, PEFT stores the head itself."""
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj", HEAD], **changes})
    model = peft.get_peft_model(transformers.LlamaForCausalLM.from_pretrained(base), config)
    generator = torch.Generator().manual_seed(1)
    for name, param in model.named_parameters():
        if "lora_" in name:
            param.data.copy_(torch.randn(param.shape, generator=generator))
    model.save_pretrained(folder)
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.lm_head.base_layer.weight"] += 1
    save_file(tensors, path)
    whole = transformers.LlamaForCausalLM.from_pretrained(base)
    return peft.PeftModel.from_pretrained(whole, folder).merge_and_unload().state_dict()


def change(folder: Path, **entries: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_is_merged_as_peft_merges_it(tmp_path: Path, rslora: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the base that it names, from here, or over one that is given."""
    save(tmp_path / "base", shard="40KB", bos_token_id=1, eos_token_id=[2, 5])
    monkeypatch.chdir(tmp_path)
    merged = adapter(tmp_path / "adapter", Path("base"), use_rslora=rslora)
    import_model(tmp_path / "adapter", tmp_path / "start", limit=40_000)
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"names its base 'base', which is no folder here: .* with --base"):
        import_model(tmp_path / "adapter", tmp_path / "again")
    import_model(tmp_path / "adapter", tmp_path / "again", base=tmp_path / "moved")
    before = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "moved").state_dict()
    for out in ("start", "again"):
        weights = Weights(verified(tmp_path / out))
        assert weights.imported["eos_token_id"] == [2, 5]
        changed = [name for name in weights.names() if float((merged[name] - before[name]).abs().max()) > 0.1]
        assert len(changed) == 5
        for name in weights.names():
            torch.testing.assert_close(weights.read(name), merged[name], rtol=1e-5, atol=1e-5)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"use_dora": True}, "use_dora True"),
    ({"modules_to_save": ["embed_tokens"]}, r"modules_to_save \['embed_tokens'\]"),
    ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
    ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern"),
    ({"layer_replication": [[0, 1], [0, 2]]}, "layer_replication"),
    ({"trainable_token_indices": [3]}, "trainable_token_indices"),
    ({"fan_in_fan_out": True}, "fan_in_fan_out"),
    ({"of_tomorrow": {"a": 1}}, "of_tomorrow"),
    ({"bias": "all"}, "bias all"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights pissa, which changes the base"),
    ({"peft_type": "IA3"}, "peft_type 'IA3', but only LORA"),
    ({"r": 8}, r"of shape .*, but r in adapter_config.json is 8"),
    ({"r": 0}, "r of at least 1, not 0"),
    ({"lora_alpha": "6"}, "lora_alpha as a finite number, not '6'"),
    ({"base_model_name_or_path": "meta-llama/Llama-2-7b-hf"}, "names its base 'meta-llama/Llama-2-7b-hf', which is "),
    ({"base_model_name_or_path": None}, "names its base '', which"),
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    save(folder / "base")
    adapter(folder / "adapter", folder / "base")
    return folder / "adapter"


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    (tmp_path / "adapter").mkdir()
    for path in made.iterdir():
        (tmp_path / "adapter" / path.name).write_bytes(path.read_bytes())
    return tmp_path / "adapter"


@pytest.mark.parametrize(("entries", "message"), REFUSED)
def test_adapters_that_are_not_plain_are_refused_by_name(copy: Path, entries: dict[str, Any], message: str) -> None:
    change(copy, **entries)
    with pytest.raises(UserError, match=message) as caught:
        import_model(copy, copy.parent / "out")
    assert "\n" not in str(caught.value) and not (copy.parent / "out").exists()


def test_tensors_that_are_not_a_plain_adapters(copy: Path, made: Path) -> None:
    path = copy / "adapter_model.safetensors"
    tensors = load_file(path)
    stem = f"base_model.model.{UP}"
    for wrong, message in (
        ({f"{stem}.lora_magnitude_vector": torch.ones(100)}, "holds or lacks .*up_proj.lora_magnitude_vector"),
        ({f"{stem}.lora_B.weight": None}, "holds or lacks .*up_proj.lora_B.weight"),
        ({"base_model.model.model.embed_tokens.weight": torch.ones(61, 64)}, "holds or lacks .*embed_tokens.weight"),
        ({f"{stem}.lora_A.weight": torch.full((4, 64), torch.nan)}, "up_proj.lora_A.weight that are not finite"),
        ({f"{stem}.lora_A.weight": torch.ones(4, 63)}, r"adapts .*up_proj.weight .* base's has shape \[100, 64"),
        (
            {f"base_model.model.x.lora_{s}.weight": torch.ones((4, 4)) for s in "AB"},
            "adapts x.weight, which its base .* does not have",
        ),
    ):  # fmt: skip
        changed = {name: tensor for name, tensor in {**tensors, **wrong}.items() if tensor is not None}
        save_file(changed, path)
        with pytest.raises(UserError, match=message):
            import_model(copy, copy.parent / "out")
    path.unlink()
    with pytest.raises(
        UserError, match=r"adapter_model.safetensors does not exist, and adapters are read from no other"
    ):
        import_model(copy, copy.parent / "out")
    with pytest.raises(UserError, match="base is not an adapter, so it has no base: leave --base out"):
        import_model(made.parent / "base", copy.parent / "out", base=made)


def test_an_adapter_brings_its_tokenizer_or_its_bases(copy: Path, made: Path) -> None:
    llama_like(copy)
    import_model(copy, copy.parent / "out")
    assert (copy.parent / "out" / "tokenizer" / "tokenizer.json").read_bytes() == (copy / "tokenizer.json").read_bytes()


def test_all_of_a_tokenizer_comes_along(tmp_path: Path) -> None:
    """Templates in files and folders, SentencePiece models under any of their names, old files beside; no code."""
    source = llama_like(save(tmp_path / "source"), chat_template=TEMPLATES)
    names = ["spiece.model", "sentencepiece.bpe.model", "tokenizer.model", "added_tokens.json", "vocab.json",
             "special_tokens_map.json", "merges.txt", "chat_template.json"]  # fmt: skip
    for name in [*names, "tokenizer.py", "README.md"]:
        (source / name).write_text(name)
    import_model(source, tmp_path / "out")
    wanted = {*names, "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
              "additional_chat_templates/tool_use.jinja"}  # fmt: skip
    kept = tmp_path / "out" / "tokenizer"
    assert {str(path.relative_to(kept)) for path in kept.rglob("*") if path.is_file()} == wanted
    for name in wanted:
        assert (kept / name).read_bytes() == (source / name).read_bytes()
    export_dense(verified(tmp_path / "out"), tmp_path / "back")
    assert {str(path.relative_to(tmp_path / "back")) for path in tokenizer_files(tmp_path / "back")} == wanted


def test_an_import_says_when_no_tokenizer_came_along(tmp_path: Path) -> None:
    save(tmp_path / "source")
    said = import_(parse(["import", str(tmp_path / "source"), str(tmp_path / "out")]))
    assert "without a tokenizer, which is not in its folder" in said and "--data.tokenizer THE_TOKENIZER" in said
    sentencepiece_only(tmp_path / "made", "spiece.model")
    (tmp_path / "made" / "spiece.model").rename(tmp_path / "source" / "spiece.model")
    said = import_(parse(["import", str(tmp_path / "source"), str(tmp_path / "again")]))
    assert "without" not in said and f"--data.tokenizer {tmp_path / 'again' / 'tokenizer'} " in said


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json", "config.json", "model.safetensors"])
def test_links_out_of_the_folder_are_not_followed(tmp_path: Path, name: str) -> None:
    source = llama_like(save(tmp_path / "source"))
    (source / name).rename(tmp_path / "private")
    (source / name).symlink_to("../private")
    with pytest.raises(UserError, match=rf"{name} is a link to .*private, out of its folder, and is not followed"):
        import_model(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("inside", ["", "notes.txt"])
def test_an_export_follows_no_link_out_of_its_checkpoint(tmp_path: Path, inside: str) -> None:
    """Neither one among the tokenizer's files, of any name, nor the tokenizer's folder as one."""
    import_model(llama_like(save(tmp_path / "source")), tmp_path / "theirs")
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "key").write_text("secret")
    link = tmp_path / "theirs" / "tokenizer" / inside
    if not inside:
        link.rename(tmp_path / "away")
    link.symlink_to(tmp_path / "private" / ("key" if inside else ""))
    checkpoint = open_checkpoint(tmp_path / "theirs")
    with pytest.raises(UserError, match=r"is a link to .*private.*, out of its folder, and is not followed"):
        export_dense(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_only_its_owner_may_read_stays_so(tmp_path: Path) -> None:
    """And a link within the folder is followed: the file itself arrives."""
    source = llama_like(save(tmp_path / "source"), chat_template="x")
    (source / "chat_template.jinja").rename(source / "away")
    (source / "chat_template.jinja").symlink_to("away")
    (source / "away").chmod(0o600)
    before = os.umask(0o022)
    try:
        import_model(source, tmp_path / "out")
    finally:
        os.umask(before)
    kept = tmp_path / "out" / "tokenizer"
    assert not (kept / "chat_template.jinja").is_symlink()
    modes = {path.name: oct(stat.S_IMODE(path.stat().st_mode)) for path in kept.iterdir()}
    assert modes == {"chat_template.jinja": "0o600", "tokenizer.json": "0o644", "tokenizer_config.json": "0o644"}


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("config.json", {"eos_token_id": "2"}, "config.json must hold eos_token_id as a token id, not '2'"),
        ("config.json", {"eos_token_id": []}, r"eos_token_id as a token id, not \[\]"),
        ("config.json", {"bos_token_id": [1]}, r"bos_token_id as a token id, not \[1\]"),
        ("generation_config.json", {"pad_token_id": True}, "generation_config.json must hold pad_token_id .* not True"),
        ("generation_config.json", "[" * 10**5, "generation_config.json is not valid JSON"),
        ("generation_config.json", "[]", "must hold a JSON object, not list"),
    ],
)
def test_marks_that_are_no_tokens(tmp_path: Path, name: str, changes: Any, message: str) -> None:
    save(tmp_path / "source")
    path = tmp_path / "source" / name
    if isinstance(changes, str):
        path.write_text(changes)
    else:
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(UserError, match=message):
        import_model(tmp_path / "source", tmp_path / "out")


class Tokenizer:
    def __init__(self, bos: int | None, eos: int | None, pad: int | None) -> None:
        self.bos_token_id, self.eos_token_id, self.pad_token_id = bos, eos, pad


@pytest.mark.parametrize(
    ("tokenizer", "imported", "config", "generation"),
    [
        (Tokenizer(3, 3, None), {}, (3, 3, None), (3, 3, None)),
        (None, {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}, (1, 2, 0), (1, 2, 0)),
        (Tokenizer(None, 2, None), {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}, (1, 2, 0), (1, 2, 0)),
        (Tokenizer(1, 2, 7), {"eos_token_id": [4, 2], "generation": {"eos_token_id": 2}}, (1, [4, 2], 7), (1, 2, 7)),
        (Tokenizer(1, 3, None), {"eos_token_id": 2, "generation": {"eos_token_id": [2, 5]}}, (1, [3, 2], None),
         (1, [3, 2, 5], None)),
    ],
)  # fmt: skip
def test_marks_are_the_tokenizers_and_the_imports(
    tokenizer: Any, imported: dict[str, Any], config: tuple, generation: tuple
) -> None:
    marks = joined_marks(tokenizer, imported)
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    assert tuple(marks[name] for name in names) == config
    assert tuple(marks["generation"][name] for name in names) == generation


def test_an_untrained_import_is_given_back(tmp_path: Path) -> None:
    source = llama_like(save(tmp_path / "source", bos_token_id=7, eos_token_id=8, pad_token_id=9))
    import_model(source, tmp_path / "start")
    export_dense(verified(tmp_path / "start"), tmp_path / "back", "fp32")
    for name in ("config.json", "generation_config.json"):
        content = json.loads((tmp_path / "back" / name).read_text())
        marks = {key: content[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        assert marks == {"bos_token_id": 7, "eos_token_id": 8, "pad_token_id": 9}, name
