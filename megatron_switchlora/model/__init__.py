"""LLaMA with Hugging Face's module names, its import and export, and analytic counts."""
