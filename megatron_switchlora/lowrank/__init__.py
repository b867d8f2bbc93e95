"""Low-rank layers, their initial values, the switching schedule and the candidate bank; independent of ZeRO."""
