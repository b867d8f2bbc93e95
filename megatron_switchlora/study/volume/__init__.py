"""Bytes that a step gives to collectives: predicted, recorded, on the wire."""
