"""The engine (the only place that imports deepspeed), the trainer and what they record."""
