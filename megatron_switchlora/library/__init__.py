"""Attach the methods to any torch model, in any training loop."""
