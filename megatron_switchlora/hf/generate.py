"""Continue a text with a trained model, through transformers.

    switchlora generate RUN "def "

RUN is the folder of a finished run, whose final/ is used, or any folder that transformers loads, such as an export. The
prompt is tokenised as the start of a document, which is the default of the model's tokenizer.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from megatron_switchlora.config.errors import UserError, ends_on_mistake, require
from megatron_switchlora.config.field_checks import number_from
from megatron_switchlora.data.hf_tokenizer import tokenizer_files
from megatron_switchlora.disk import user_path

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


def model_folder(run: Path) -> Path:
    """Return the folder to load.

    Raises:
        UserError: there is none.
    """
    for folder in (run / "final", run):
        if (folder / "config.json").is_file() and any((folder / name).is_file() for name in WEIGHTS):
            return folder
    exported = "it holds checkpoints: " if (run / "checkpoints").is_dir() or (run / "manifest.json").is_file() else ""
    advice = (
        "export one with `switchlora convert export` and give that folder"
        if exported
        else "give a finished run's folder"
    )
    raise UserError(f"neither {run / 'final'} nor {run} holds a model to load: {exported}{advice}.")


def load(folder: Path) -> tuple[Any, Any]:
    """Load tokenizer and model; never run code from the folder.

    Raises:
        UserError: there is no tokenizer, or tokenizer or model do not load.
    """
    require(
        bool(tokenizer_files(folder)),
        f"{folder} holds no tokenizer, which is needed to read the prompt: put the model's tokenizer files there.",
    )
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, JSON and safetensors errors alike
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{folder} does not load in transformers: {reason}") from None
    return tokenizer, model.eval()


def generate(arguments: argparse.Namespace) -> str:
    """Return the prompt and its continuation.

    Raises:
        UserError: the folder does not load, or the prompt is empty and the tokenizer has no begin or end mark.
    """
    tokenizer, model = load(model_folder(arguments.run))
    torch.manual_seed(arguments.seed)
    begin = [mark for mark in (tokenizer.eos_token_id, tokenizer.bos_token_id) if mark is not None]
    tokens = tokenizer(arguments.prompt)["input_ids"] or begin[:1]  # without a prompt, start a document
    require(len(tokens) > 0, "The prompt is empty and the tokenizer has no mark to start with: give a prompt.")
    prompt = torch.tensor([tokens])
    sampling: dict[str, Any] = {"do_sample": False}  # whatever the model's generation_config.json says
    if arguments.temperature > 0:
        sampling = {"do_sample": True, "temperature": arguments.temperature}
    with torch.no_grad():
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=arguments.max_new_tokens,
            pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
            **sampling,
        )
    return str(tokenizer.decode(out[0], skip_special_tokens=True))


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=user_path, help="run folder, or any folder that transformers loads")
    parser.add_argument("prompt", help="text to continue")
    parser.add_argument("--max_new_tokens", type=number_from(1), default=100)
    parser.add_argument(
        "--temperature", type=number_from(0, float), default=0.8, help="0 always takes the likeliest token"
    )
    parser.add_argument("--seed", type=number_from(0), default=0)
    arguments = parser.parse_args(argv)
    with ends_on_mistake():
        print(generate(arguments))
