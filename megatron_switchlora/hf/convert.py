"""Convert between this project's checkpoints and Hugging Face folders.

    switchlora convert export RUN_OR_CHECKPOINT OUT [--dtype fp32] [--peft [--original_base]]
    switchlora convert import HF_DIR OUT [--base HF_DIR] [--plugins MODULE ...]

export folds the adapters and writes a folder that AutoModelForCausalLM loads. With --peft it writes OUT/base and
OUT/adapter, which PeftModel loads. The adapter gives the absolute path of OUT/base, which AutoPeftModel follows. If you
move the folders, pass the base to PeftModel yourself. For a run that started with LoRA-GA, --original_base writes the
matrices from which the run started, with an adapter of twice the rank.

import makes a LLaMA, or a model of a plugin's family, the starting point of a run: --config OUT/model.yaml
--train.init_from OUT. A LoRA of PEFT is merged into its base. Both commands need memory for only a few layers.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from megatron_switchlora.checkpoint.files import verified
from megatron_switchlora.checkpoint.weights import find_folder
from megatron_switchlora.config.command_line import require_utf8
from megatron_switchlora.config.errors import ends_on_mistake, require
from megatron_switchlora.config.field_checks import number_from
from megatron_switchlora.disk import user_path
from megatron_switchlora.hf.export import DTYPES, export_dense, export_peft
from megatron_switchlora.hf.start import import_model


def export(arguments: argparse.Namespace) -> str:
    checkpoint = verified(find_folder(arguments.source))
    limit = int(arguments.shard_mb * 1e6)
    if arguments.peft:
        export_peft(checkpoint, arguments.out, arguments.dtype, limit, arguments.original_base)
    else:
        require(not arguments.original_base, "--original_base selects the base of --peft's adapter: give --peft too.")
        export_dense(checkpoint, arguments.out, arguments.dtype, limit)
    parts = f"{arguments.out}/base and {arguments.out}/adapter" if arguments.peft else str(arguments.out)
    return f"{checkpoint.folder} (step {checkpoint.step}) exported as {arguments.dtype} to {parts}"


def import_(arguments: argparse.Namespace) -> str:
    out = arguments.out
    import_model(arguments.source, out, base=arguments.base, plugins=arguments.plugins)
    has_tokenizer = (out / "tokenizer").is_dir()
    tokenizer = f"{out}/tokenizer" if has_tokenizer else "THE_TOKENIZER_IT_WAS_TRAINED_WITH"
    return (
        f"{arguments.source} imported{'' if has_tokenizer else ' without a tokenizer, which is not in its folder'}. "
        f"Start from it: switchlora pretrain --config {out}/model.yaml --train.init_from {out} "
        f"--data.tokenizer {tokenizer} ..."
    )


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; `act` is the function of the chosen command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    out = commands.add_parser("export", help="convert a checkpoint to Hugging Face or PEFT")
    out.add_argument("source", type=user_path, metavar="RUN_OR_CHECKPOINT")
    out.add_argument("out", type=user_path, metavar="OUT")
    out.add_argument("--dtype", choices=sorted(DTYPES), default="bf16", help="cast after folding (default: bf16)")
    out.add_argument("--peft", action="store_true", help="write base model and adapter separately, for PeftModel")
    out.add_argument("--original_base", action="store_true", help="with --peft, for a run that started with LoRA-GA")
    out.add_argument(
        "--shard_mb", type=number_from(0.001, float), default=1000.0, help="largest safetensors file, in MB"
    )
    out.set_defaults(act=export)
    into = commands.add_parser("import", help="convert a Hugging Face model to a starting point")
    into.add_argument("source", type=user_path, metavar="HF_DIR")
    into.add_argument("out", type=user_path, metavar="OUT")
    into.add_argument("--base", type=user_path, metavar="HF_DIR", help="an adapter's base, if that has moved")
    into.add_argument("--plugins", nargs="+", default=[], metavar="MODULE", help="modules that register its family")
    into.set_defaults(act=import_)
    return parser.parse_args(words)


def main(argv: Sequence[str]) -> None:
    arguments = parse(argv)
    with ends_on_mistake():
        require_utf8(argv)
        print(arguments.act(arguments))
