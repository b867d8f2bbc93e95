"""Mesh, shards, collectives and consensus of ranks."""
