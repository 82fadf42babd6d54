"""From rows to what a model is called with. Nothing is drawn at random, so a resumed run sees the
same.
"""

import copy
from collections.abc import Callable, Mapping
from functools import partial
from itertools import chain
from typing import Any

from datasets import Dataset
from transformers import (
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    default_data_collator,
)

Batch = dict[str, list[Any]]
IGNORED = -100  # the label of a token that is not measured


def encode(
    rows: Dataset,
    task: str,
    processor: Any,
    classes: Mapping[Any, int],
    tokens: int,
    last_words: bool,
) -> tuple[Dataset, Callable[[list[Any]], Any]]:
    """Return the rows as inputs of a model, and what makes a batch of some of them.

    classes: the model's class of each label, as it stands in the rows. Texts are cut to `tokens`
    tokens and padded to the longest of their batch; for generation they are joined and cut into
    rows of just as many. With last_words they are not: a row is a text up to its last word, whose
    tokens are the labels.
    """
    if task == "image-classification":
        image, label = rows.column_names
        options = {"image": image, "label": label, "processor": processor, "classes": classes}
        return rows.with_transform(partial(_pixels, **options)), default_data_collator
    processor = copy.deepcopy(processor)  # it remembers how it was called, and is saved at the end
    options = {"tokenizer": processor, "tokens": tokens}
    if task == "text-generation" and last_words:
        collate = _padding(processor)
        return map_rows(rows, _last_words, options), collate
    if task == "text-generation":
        encoded = map_rows(rows, _blocks, options)
        if not len(encoded):
            raise ValueError(f"the texts are too short for one row of {tokens}: lower --tokens")
        return encoded, default_data_collator
    return map_rows(rows, _words, {**options, "classes": classes}), DataCollatorWithPadding(
        processor
    )


def map_rows(rows: Dataset, function: Callable[..., Batch], options: dict[str, Any]) -> Dataset:
    return rows.map(
        function,
        batched=True,
        fn_kwargs={**options, "columns": rows.column_names},
        remove_columns=rows.column_names,
    )


def _words(
    batch: Batch, tokenizer: Any, tokens: int, classes: Mapping[Any, int], columns: list[str]
) -> Batch:
    *texts, label = columns
    check_texts(batch, texts)
    encoded = tokenizer(*(batch[text] for text in texts), truncation=True, max_length=tokens)
    return {**encoded, "labels": [classes[value] for value in batch[label]]}


def _blocks(batch: Batch, tokenizer: Any, tokens: int, columns: list[str]) -> Batch:
    check_texts(batch, columns)
    texts = [text + (tokenizer.eos_token or "") for text in batch[columns[0]]]
    ids = list(chain.from_iterable(tokenizer(texts)["input_ids"]))
    rows = [ids[i : i + tokens] for i in range(0, len(ids) - tokens + 1, tokens)]
    return {"input_ids": rows, "labels": rows}


def _last_words(batch: Batch, tokenizer: Any, tokens: int, columns: list[str]) -> Batch:
    check_texts(batch, columns)
    texts = [text.rstrip() for text in batch[columns[0]]]
    encoded = tokenizer(texts, truncation=True, max_length=tokens, return_offsets_mapping=True)
    rows = list(map(_to_last_word, texts, encoded["input_ids"], encoded["offset_mapping"]))
    return {
        "input_ids": [ids for ids, _ in rows],
        "attention_mask": [[1] * len(ids) for ids, _ in rows],
        "labels": [labels for _, labels in rows],
    }


def _to_last_word(
    text: str, ids: list[int], offsets: list[tuple[int, int]]
) -> tuple[list[int], list[int]]:
    """Return the tokens up to the last of the text's last word, and as labels those of the word."""
    words = text.split()
    start = len(text) - len(words[-1]) if words else 0
    found = [i for i, (_, end) in enumerate(offsets) if end > start]
    if len(words) < 2 or not found or not found[0] or offsets[found[0]][0] > start:
        raise ValueError(
            f"a last word needs words before it, and all of it within --tokens, got {text[-40:]!r}"
        )
    first, end = found[0], found[-1] + 1  # a tokenizer may add its own after the word
    return ids[:end], [IGNORED] * first + ids[first:end]


def _padding(tokenizer: Any) -> Callable[[list[Any]], Any]:
    """Prepare a tokenizer for texts that keep their ends, and return what makes batches of them."""
    if not tokenizer.is_fast:
        name = type(tokenizer).__name__
        raise ValueError(f"last words need a tokenizer that tells where tokens stand, got {name}")
    tokenizer.truncation_side = "left"
    tokenizer.padding_side = "right"  # positions are counted from the start
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return DataCollatorForTokenClassification(tokenizer, label_pad_token_id=IGNORED)


def _pixels(
    batch: Batch, image: str, label: str, processor: Any, classes: Mapping[Any, int]
) -> Batch:
    images = [picture.convert("RGB") for picture in batch[image]]
    pixels = processor(images, return_tensors="pt")["pixel_values"]
    return {"pixel_values": list(pixels), "labels": [classes[value] for value in batch[label]]}


def check_texts(batch: Batch, columns: list[str]) -> None:
    for column in columns:
        if None in batch[column]:
            raise ValueError(f"column {column!r} has rows without a text: leave them out")
