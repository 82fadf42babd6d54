"""Tuning from the command line: a model, its data, and a folder that survives a kill."""
