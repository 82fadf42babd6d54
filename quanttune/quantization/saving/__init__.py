"""A quantized model as data and as files."""
