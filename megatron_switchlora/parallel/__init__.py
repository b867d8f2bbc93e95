"""Mesh, ranks and parallel layers; knows nothing of LoRA."""
