"""What a step, switching, a checkpoint and an export cost."""
