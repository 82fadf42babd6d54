"""Ship a quantized model: files of integers, and what runtimes make of them."""
