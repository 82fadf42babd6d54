"""Models to equalize: those of models.py, and some whose LayerNorms are read in other ways."""

import pytest
import torch
from models import BATCH, CLASSES, DEEP, TOKENS, WORDS, Example
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from quanttune.quantization.methods import AWEQ, AWQ, OutlierSuppression, RepQ, SmoothQuant
from quanttune.quantization.methods.equalizing.readers import find_pairs
from quanttune.quantization.methods.rounding.layers import layers_of
from quanttune.quantization.running import Data


def deit() -> Example:
    model = VisionTransformerDistilled(
        img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=2, num_classes=CLASSES
    )
    return Example(model, torch.randn(BATCH, 3, 16, 16), torch.zeros(BATCH), ("head",))


def gpt2() -> Example:
    """Return a model of Conv1D modules, whose head is tied."""
    sizes = {"vocab_size": WORDS, "n_embd": 24, "n_layer": 2, "n_head": 2, "n_positions": 16}
    config = GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    words = torch.randint(2, WORDS, (BATCH, TOKENS))
    return Example(GPT2LMHeadModel(config), words, words, ("lm_head",))


def opt_after() -> Example:
    """Return what OPT-350m is: LayerNorms after the sums, and projections around the blocks."""
    sizes = {"vocab_size": WORDS, "hidden_size": 24, "word_embed_proj_dim": 16, "ffn_dim": 48}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 16}
    config = OPTConfig(**sizes, **heads, do_layer_norm_before=False, use_cache=False)
    words = torch.randint(2, WORDS, (BATCH, TOKENS))
    return Example(OPTForCausalLM(config), words, words, ("lm_head",))


EXAMPLES = {**DEEP, "deit": deit, "gpt2": gpt2, "opt after": opt_after}
METHODS = (SmoothQuant(), OutlierSuppression(), RepQ(), AWEQ(), AWQ())
POST = ("bert", "opt after")
each_model = pytest.mark.parametrize("name", EXAMPLES)
each_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
RESTORED = {  # LayerNorms that more than Linear modules read
    "bert": [
        "bert.embeddings.LayerNorm",
        "bert.encoder.layer.0.attention.output.LayerNorm",
        "bert.encoder.layer.0.output.LayerNorm",
        "bert.encoder.layer.1.attention.output.LayerNorm",
    ],
    "opt after": [
        "model.decoder.layers.0.self_attn_layer_norm",
        "model.decoder.layers.0.final_layer_norm",
        "model.decoder.layers.1.self_attn_layer_norm",
    ],
}


def prepared(name: str) -> Example:
    """Return an example in float64, whose parameters are far from what they are initialized to."""
    example = EXAMPLES[name]()
    example.model.eval().double().requires_grad_(False)
    for parameter in example.model.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    if example.inputs.is_floating_point():
        example.inputs = example.inputs.double()
    return example


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def grown(name: str) -> Example:
    """Return an example in which some channels of LayerNorms are outliers."""
    example = EXAMPLES[name]()
    example.model.eval().requires_grad_(False)
    for parameter in example.model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, 0, parameter.shape[-1] ** -0.5)
    for pair in find_pairs(example.model, Data([example.inputs])):
        for parameter in (pair.norm.module.weight, pair.norm.module.bias):
            parameter[[3, 8]] *= 50
        for columns in pair.columns():
            columns[:, [3, 8]] /= 50
    return example


class Block(nn.Module):
    """A LayerNorm and two Linear modules that read it."""

    def __init__(self, channels: int = 4, bias: bool = True) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        nn.init.normal_(self.norm.bias)
        self.one, self.other = (nn.Linear(channels, 3, bias) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.one(y) * self.other(y).sigmoid()


def rounded_names(model: nn.Module) -> list[str]:
    """Return the names of the layers whose weights methods round, in a quantized model."""
    modules = {layer.module for layer in layers_of(model)}
    return [name for name, module in model.named_modules() if module in modules]
