"""Tokens in front of every sequence whose keys and values are constants of the model."""
