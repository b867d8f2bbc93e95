"""SwitchLoRA, LTE and LoRA-GA pre-training of LLaMA models on PyTorch and DeepSpeed."""

from typing import Any

__version__ = "0.2.0"
__all__ = ["attach"]


def __getattr__(name: str) -> Any:
    """Import the library when it is asked for: command lines need not wait for it."""
    if name == "attach":
        from megatron_switchlora.library.attach import attach

        return attach
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
