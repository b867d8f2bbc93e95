"""Checkpoints on disk: `archive` reads tensors by name and box, `files` publishes, verifies and prunes folders."""
