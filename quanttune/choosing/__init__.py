"""Which way to quantize a model: targets, what can be done, and the search among it."""
