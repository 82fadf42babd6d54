"""The rows of the MiniLM demo in a file, so that libraries in several environments see the same."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

Embed = Callable[[Tensor], Tensor]  # of a batch of token ids, one embedding each
SPLITS = ("validation", "test")
CALIBRATION_BATCH, EVALUATION_BATCH = 32, 256


def write(path: Path) -> None:
    """Write the demo's rows and the float embeddings; they depend on the packages installed."""
    from quanttune.demo.minilm import MiniLM

    job = MiniLM(0)
    found = {"calibration": torch.cat([batch["input_ids"] for batch in job.calibration()])}
    for split in SPLITS:
        found[split] = getattr(job.rows, split)
        found[f"{split}_embeddings"] = job.embed(job._teacher, found[split])
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, path)


def feed(model: nn.Module, batch: Tensor | Mapping[str, Tensor]) -> None:
    """Call a model with token ids, or with all that a batch holds."""
    model(**(batch if isinstance(batch, Mapping) else {"input_ids": batch}))


class Rows:
    """What every library is given, and what it is measured on."""

    def __init__(self, path: Path) -> None:
        self._tensors = load_file(path)

    def calibration(self, batch: int = CALIBRATION_BATCH) -> list[Tensor]:
        return list(self._tensors["calibration"].split(batch))

    @torch.no_grad()
    def cosine(self, embed: Embed, split: str) -> float:
        """Return the mean cosine between embeddings and the float model's own."""
        parts = self._tensors[split].split(EVALUATION_BATCH)
        embeddings = torch.cat([embed(part) for part in parts])
        wanted = self._tensors[f"{split}_embeddings"]
        return F.cosine_similarity(embeddings, wanted).mean().item()

    def fingerprint(self) -> int:
        """Return a number that other rows do not have."""
        ids = torch.cat([self._tensors[name].flatten() for name in ("calibration", *SPLITS)])
        places = torch.arange(len(ids)) % 8191 + 1
        return int((ids * places).sum())


@dataclass(frozen=True)
class ModelEmbedding:
    """The embeddings of a model of transformers: the mean over its tokens."""

    model: nn.Module

    def __call__(self, ids: Tensor) -> Tensor:
        embedding: Tensor = self.model(input_ids=ids).last_hidden_state.mean(1)
        return embedding


def of_states(states: Callable[[Tensor], Tensor]) -> Embed:
    """Return the embeddings of what gives the states of all tokens as a tensor."""
    return lambda ids: states(ids).mean(1)


class States(nn.Module):
    """An encoder as a graph wants it: token ids to a tensor."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor) -> Tensor:
        states: Tensor = self.encoder(input_ids=input_ids).last_hidden_state
        return states
