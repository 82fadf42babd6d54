"""What the kinds of tensors in quanttune.quantization.coverage are called on a page."""

NAMES = {
    "input": "inputs of Linear",
    "convolution": "inputs of convolutions",
    "output": "outputs of Linear",  # and of convolutions
    "norm": "outputs of LayerNorm",
    "residual": "residual sums",
    "operand": "operands of attention",
    "score": "attention scores",
    "probability": "softmax outputs",
}
