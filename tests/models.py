"""Small Transformers with random weights and no dropout, each with a batch and a loss.

They have one block, unless a test is about several: what is done to a block is done to each.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.deit import VisionTransformerDistilled
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
)

BATCH = 4
CLASSES = 5
TOKENS = 7
WORDS = 60
_VIT: dict[str, Any] = {
    "img_size": 16,
    "patch_size": 4,
    "embed_dim": 24,
    "num_heads": 2,
    "num_classes": CLASSES,
}
BLOCKS = {
    "vit": "blocks",
    "deit": "blocks",
    "bert": "bert.encoder.layer",
    "opt": "model.decoder.layers",
    "swin": "layers.0.blocks",
}


@dataclass
class Example:
    """A model in training mode, its data, and the modules whose outputs are logits."""

    model: nn.Module
    inputs: Tensor  # (BATCH, ...)
    labels: Tensor  # (BATCH,) or (BATCH, TOKENS)
    heads: tuple[str, ...]

    def logits(self, model: nn.Module | None = None, rows: slice = slice(None)) -> Tensor:
        """Call the model, or another one in its place, on some rows of the batch."""
        output = (self.model if model is None else model)(self.inputs[rows])
        return output if isinstance(output, Tensor) else output.logits

    def task_loss(self, model: nn.Module | None = None, rows: slice = slice(None)) -> Tensor:
        """Return the cross-entropy, a mean over the rows (and their tokens)."""
        logits = self.logits(model, rows)
        return F.cross_entropy(logits.flatten(0, -2), self.labels[rows].flatten())


def vit(blocks: int = 1) -> Example:
    model = VisionTransformer(**_VIT, depth=blocks)
    return Example(model, torch.randn(BATCH, 3, 16, 16), _classes(), ("head",))


def deit(blocks: int = 1) -> Example:
    """Return a DeiT with the token and the head of distillation."""
    model = VisionTransformerDistilled(**_VIT, depth=blocks)
    heads = ("head", "head_dist")
    return Example(model, torch.randn(BATCH, 3, 16, 16), _classes(), heads)


def swin(blocks: int = 2) -> Example:
    """Return a Swin whose Linear modules see (windows * BATCH, tokens, channels).

    The windows of the second block are shifted.
    """
    model = SwinTransformer(
        img_size=32,
        patch_size=4,
        window_size=4,
        embed_dim=12,
        depths=(blocks, 1),
        num_heads=(1, 2),
        num_classes=CLASSES,
        drop_path_rate=0.0,
    )
    return Example(model, torch.randn(BATCH, 3, 32, 32), _classes(), ("head.fc",))


def bert(blocks: int = 1) -> Example:
    config = BertConfig(
        vocab_size=WORDS,
        hidden_size=24,
        num_hidden_layers=blocks,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=CLASSES,
    )
    return Example(
        BertForSequenceClassification(config).train(), _words(), _classes(), ("classifier",)
    )


def opt(blocks: int = 1) -> Example:
    """Return an OPT, whose feed-forward modules see (BATCH * TOKENS, channels)."""
    config = OPTConfig(
        vocab_size=WORDS,
        hidden_size=24,
        word_embed_proj_dim=24,
        num_hidden_layers=blocks,
        num_attention_heads=2,
        ffn_dim=48,
        max_position_embeddings=16,
        dropout=0.0,
        attention_dropout=0.0,
        use_cache=False,
    )
    words = _words()
    return Example(OPTForCausalLM(config).train(), words, words.roll(-1, 1), ("lm_head",))


def gpt2(blocks: int = 1) -> Example:
    """Return a model of Conv1D modules, whose head is tied to the embeddings."""
    sizes = {"vocab_size": WORDS, "n_embd": 24, "n_layer": blocks, "n_head": 2, "n_positions": 16}
    words = _words()
    model = GPT2LMHeadModel(GPT2Config(**sizes, use_cache=False))
    return Example(model, words, words.roll(-1, 1), ("lm_head",))


class Shared(nn.Module):
    """One Linear that is called three times, and has two names."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(8, 8)
        self.alias = self.shared
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = x + self.shared(x).tanh()
        return self.head(self.norm(x))


MODELS: dict[str, Callable[..., Example]] = {"vit": vit, "swin": swin, "bert": bert, "opt": opt}
DEEP = {name: partial(make, 2) for name, make in MODELS.items()}


def shallow(name: str) -> Example:
    """Return a model of one block in evaluation mode, whose weights are large enough to matter."""
    example = {**MODELS, "deit": deit}[name](2)
    del example.model.eval().get_submodule(BLOCKS[name])[1:]
    for parameter in example.model.parameters():
        if parameter.dim() > 1:  # those of a fresh model are small: all rounds to little
            nn.init.normal_(parameter, 0, parameter.shape[-1] ** -0.5)
    return example


def with_padding(ids: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return texts with their mask, and the same with three tokens of padding behind."""
    mask = torch.ones_like(ids)
    longer, of_longer = torch.cat([ids, ids[:, :3]], 1), torch.cat([mask, 0 * mask[:, :3]], 1)
    return (
        {"input_ids": ids, "attention_mask": mask},
        {"input_ids": longer, "attention_mask": of_longer},
    )


def _classes() -> Tensor:
    return torch.randint(CLASSES, (BATCH,))


def _words() -> Tensor:
    return torch.randint(2, WORDS, (BATCH, TOKENS))
