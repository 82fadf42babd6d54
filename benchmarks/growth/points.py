"""What is measured: decoders of OPT's kind with random weights, larger along one axis at a time."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import OPTConfig, OPTForCausalLM

VOCABULARY = 50272  # OPT's


@dataclass(frozen=True)
class Point:
    """A model and a batch of token rows for it."""

    width: int = 384
    layers: int = 6
    tokens: int = 128
    rows: int = 1
    vocabulary: int = 1000  # few words: else the head is most of a small model

    def model(self) -> OPTForCausalLM:
        """Return a float model with random weights; heads have 64 channels, as all of OPT's."""
        torch.manual_seed(0)
        config = OPTConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            word_embed_proj_dim=self.width,
            ffn_dim=4 * self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.width // 64,
            max_position_embeddings=max(2048, self.tokens),
            dropout=0.0,
        )
        return OPTForCausalLM(config)

    def batch(self) -> Tensor:
        """Return rows of random tokens."""
        generator = torch.Generator().manual_seed(1)
        shape = (self.rows, self.tokens)
        return torch.randint(4, self.vocabulary, shape, generator=generator)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


# OPT's own widths and layers, but for 1024 and 1536: its models of 350 and 760 million differ
SIZES = ((768, 12), (1024, 16), (1280, 20), (1536, 24), (2048, 24))
AXES: dict[str, list[Point]] = {
    "size": [Point(width, layers, vocabulary=VOCABULARY) for width, layers in SIZES],
    "tokens": [Point(tokens=128 * 4**n) for n in range(4)],
    "rows": [Point(rows=4**n) for n in range(4)],
    "layers": [Point(width=128, layers=3 * 2**n, rows=4) for n in range(5)],
}
