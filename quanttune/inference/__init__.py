"""Moved to quanttune.deploy."""
