"""Check that a file computes what the quantized model simulates."""
