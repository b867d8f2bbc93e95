"""Save, verify, read and resume checkpoints."""
