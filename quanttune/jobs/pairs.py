"""From pairs of texts to what an encoder and its decoder are called with."""

from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from torch import Tensor
from transformers import DataCollatorForSeq2Seq

from .encoding import IGNORED, Batch, check_texts, map_rows


@dataclass(frozen=True)
class PairCollator:
    """Makes a batch of pairs: `labels`, and what the decoder is called with to write them.

    It is called with the labels moved one on, behind the token that texts start with, as the
    models' own code does; here with a mask, so that padding takes no part in ranges or losses.
    """

    pad: DataCollatorForSeq2Seq
    start_id: int
    pad_id: int

    def __call__(self, rows: list[Any]) -> dict[str, Tensor]:
        batch: dict[str, Tensor] = dict(self.pad(rows))
        moved = batch["labels"].roll(1, 1)
        moved[:, 0] = self.start_id
        batch["decoder_input_ids"] = moved.masked_fill(moved == IGNORED, self.pad_id)
        # what is fed the end has nothing to write
        batch["decoder_attention_mask"] = (batch["labels"] != IGNORED).long()
        return batch


def encode(rows: Dataset, tokenizer: Any, tokens: int, config: Any) -> tuple[Dataset, PairCollator]:
    """Return pairs as inputs of a model, and what makes a batch of some of them.

    Both texts are cut to `tokens` tokens, and padded to the longest of their batch.

    Raises:
        ValueError: the model's configuration does not say how texts start, or what pads them.
    """
    start_id, pad_id = config.decoder_start_token_id, config.pad_token_id
    if start_id is None or pad_id is None:
        raise ValueError(
            "the model's configuration must have a decoder_start_token_id and a pad_token_id, got "
            f"{start_id} and {pad_id}"
        )
    encoded = map_rows(rows, _pairs, {"tokenizer": tokenizer, "tokens": tokens})
    pad = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)
    return encoded, PairCollator(pad, start_id, pad_id)


def _pairs(batch: Batch, tokenizer: Any, tokens: int, columns: list[str]) -> Batch:
    check_texts(batch, columns)
    read, written = (batch[column] for column in columns)
    options = {"truncation": True, "max_length": tokens}
    found = tokenizer(read, **options)
    labels = tokenizer(text_target=written, **options)["input_ids"]
    return {**{name: found[name] for name in ("input_ids", "attention_mask")}, "labels": labels}
