"""Row-step AdamW, its layout over ZeRO's flat partitions, learning-rate schedules, GaLore and pruning."""
