"""Ship a quantized model: as a file whose integers a runtime computes with."""
