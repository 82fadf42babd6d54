"""How ranges are learned with the weights of a quantized model, a file per method."""
