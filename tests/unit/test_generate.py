"""tools/generate.py: what it reads, and what it refuses in one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from megatron_switchlora.hf.generate import main
from tests.hf_folders import save
from tests.hf_tokenizers import configure, llama_like


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In several files, with a tokenizer that begins a text and a generation_config.json that would sample."""
    folder = save(tmp_path_factory.mktemp("model"), shard="40KB", vocab_size=280)
    assert (folder / "model.safetensors.index.json").is_file() and not (folder / "model.safetensors").exists()
    transformers.GenerationConfig(do_sample=True, temperature=5.0, eos_token_id=2).save_pretrained(folder)
    return llama_like(folder)


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Exit status, output and errors of a command line."""
    status = 0
    try:
        main(words)
    except SystemExit as end:
        status = int(end.code or 0)
    said = capsys.readouterr()
    return status, said.out, said.err


def test_an_export_in_several_files_goes_on_as_a_document_would(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Alone, or as a run's final/; behind the mark that its tokenizer puts before a text."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "final").symlink_to(model)
    network, tokenizer = (
        kind.from_pretrained(model) for kind in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer)
    )
    for prompt, tokens in (("one", tokenizer("one").input_ids), ("", [1])):
        assert tokens[0] == 1
        wanted = network.generate(torch.tensor([tokens]), max_new_tokens=5, do_sample=False, pad_token_id=0)
        for folder in (model, tmp_path / "run"):
            words = (str(folder), prompt, "--max_new_tokens", "5", "--temperature", "0")
            status, out, err = run(capsys, *words)
            assert status == 0 and out == tokenizer.decode(wanted[0], skip_special_tokens=True) + "\n", err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max_new_tokens", "0"], "--max_new_tokens: it must be at least 1, not 0"),
        (["--max_new_tokens=-3"], "--max_new_tokens: it must be at least 1, not -3"),
        (["--temperature", ".nan"], "--temperature: it must be a finite number"),
        (["--temperature", "1e39"], "--temperature: it must be a finite number"),
        (["--temperature=-1"], "--temperature: it must be at least 0, not -1"),
        (["--seed", str(2**65)], "--seed: it must be a whole number of 64 bits"),
    ],
)
def test_options_out_of_range(model: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, str(model), "one", *words)
    assert status == 2 and message in err and "Traceback" not in err


def test_folders_that_do_not_load(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    save(tmp_path / "wordless")
    llama_like(save(tmp_path / "damaged"))
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"x")
    auto_map = {"AutoTokenizer": ["odd.Odd", "odd.Odd"]}
    configure(llama_like(save(tmp_path / "odd")), tokenizer_class="Odd", auto_map=auto_map)
    (tmp_path / "odd" / "odd.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    for name, message in (
        ("absent", "holds a model to load: give a finished run's folder."),
        ("run", "holds a model to load: it holds checkpoints: export one with `switchlora convert export`"),
        ("wordless", "holds no tokenizer, which is needed to read the prompt"),
        ("damaged", "damaged does not load in transformers: "),
        ("odd", "odd does not load in transformers: "),
    ):
        status, _, err = run(capsys, str(tmp_path / name), "one")
        said = [line for line in err.splitlines() if line.startswith("error: ")]
        assert status == 2 and len(said) == 1 and message in said[0], err
    assert not (tmp_path / "ran").exists()
