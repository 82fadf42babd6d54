"""Which tensors are quantized: named presets, since every number depends on them.

Which tensor is of which kind, convert.py decides, and functional/ for what no module holds.

| kind        | tensors |
|---|---|
| input       | inputs of Linear and Conv1D |
| convolution | inputs of Conv1d to Conv3d |
| output      | outputs of Linear, Conv1D and convolutions, before a nonlinearity too |
| norm        | outputs of LayerNorm |
| residual    | inputs of LayerNorm, sums of two activations of one shape (or one for all samples) |
| embedding   | embedding tables |
| operand     | q, k and v of attention; both operands of any other product of activations |
| score       | products of activations that go into a softmax |
| probability | outputs of a softmax that go into a product |

Weights are quantized in every preset, biases in none; LayerNorm and softmax are computed in float.
"""

_ALL = frozenset({
    "input", "convolution", "output", "norm", "residual", "embedding", "operand", "score",
    "probability",
})  # fmt: skip
_PRODUCTS = frozenset({"input", "operand", "probability"})

PRESETS: dict[str, frozenset[str]] = {
    # AWQ, GPTQ: what is stored and moved is small, and products are those of floats
    "weight_only": frozenset(),
    # torchao, vLLM: attention stays in float, as FlashAttention computes it
    "linear_inputs": frozenset({"input"}),
    # PTQ4ViT, RepQ-ViT, ERQ: inputs of Linear layers and both operands of attention's products
    "linear": _PRODUCTS,
    # NNCF's for Transformers: tables hold a third to half of a small encoder's bytes
    "linear_embedding": _PRODUCTS | {"embedding"},
    # our reading of QuantTune's "whole model except softmax and layer normalization"
    "full_no_softmax": _ALL - {"probability"},
    # FQ-ViT without its integer softmax
    "full": _ALL,
}


def kinds_of(preset: str, residual: bool) -> frozenset[str]:
    """Return the kinds of tensors that a preset quantizes, with or without the residual stream."""
    if preset not in PRESETS:
        raise ValueError(f"coverage must be one of {', '.join(PRESETS)}, got {preset!r}")
    return PRESETS[preset] if residual else PRESETS[preset] - {"residual"}
