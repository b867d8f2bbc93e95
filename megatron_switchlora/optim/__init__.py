"""Row-step AdamW, its layout over ZeRO's flat partitions, learning-rate schedule; knows rows, not LoRA."""
