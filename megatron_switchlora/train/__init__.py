"""Train a run: the engine (the only module that imports deepspeed), the trainer, and what they record."""
