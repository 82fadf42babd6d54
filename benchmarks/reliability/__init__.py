"""Attacks, faults made on purpose, and the page of what came of them."""
