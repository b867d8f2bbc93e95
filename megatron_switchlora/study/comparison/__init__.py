"""Comparing methods at swept rates over several seeds."""
