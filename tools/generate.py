#!/usr/bin/env python3
"""Continue a text with a trained model, through transformers.

    python tools/generate.py RUN "def "

RUN is a run folder (its final/ is used) or any folder that transformers loads.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import transformers

from megatron_switchlora.disk import user_path
from megatron_switchlora.field_checks import number_from


def model_folder(run: Path) -> Path:
    """The folder to load, or an explanation and exit status 2."""
    for folder in (run / "final", run):
        if (folder / "config.json").is_file() and (folder / "model.safetensors").is_file():
            return folder
    print(
        f"error: neither {run / 'final'} nor {run} holds a model: give the folder of a finished run.", file=sys.stderr
    )
    sys.exit(2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=user_path, help="run folder")
    parser.add_argument("prompt", help="text to continue")
    parser.add_argument("--max_new_tokens", type=number_from(1), default=100)
    parser.add_argument("--temperature", type=number_from(0, float), default=0.8, help="0 takes the likeliest token")
    parser.add_argument("--seed", type=number_from(0), default=0)
    arguments = parser.parse_args()
    folder = model_folder(arguments.run)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    torch.manual_seed(arguments.seed)
    prompt = arguments.prompt or tokenizer.eos_token  # nothing to continue: begin a document
    tokens = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    sampling = {"do_sample": True, "temperature": arguments.temperature} if arguments.temperature > 0 else {}
    with torch.no_grad():
        out = model.generate(
            tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            max_new_tokens=arguments.max_new_tokens,
            pad_token_id=tokenizer.eos_token_id,
            **sampling,
        )
    print(tokenizer.decode(out[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
