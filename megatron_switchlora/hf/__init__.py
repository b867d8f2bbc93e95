"""Exchange models and adapters with Hugging Face and PEFT."""
