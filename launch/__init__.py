"""Scripts that start runs; an installed package holds them as megatron_switchlora.launch."""
