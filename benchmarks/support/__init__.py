"""Which models can be tuned and quantized: docs/support.md."""
