"""SwitchLoRA, LTE and LoRA-GA pre-training of LLaMA models on PyTorch and DeepSpeed."""

__version__ = "0.2.0"
