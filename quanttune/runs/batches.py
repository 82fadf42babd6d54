"""From rows to what a model is called with. Nothing is drawn at random, so a resumed run sees the
same.
"""

import copy
from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import Any

from datasets import Dataset
from transformers import DataCollatorWithPadding, default_data_collator

Batch = dict[str, list[Any]]


def encode(
    rows: Dataset, task: str, processor: Any, classes: list[int], tokens: int
) -> tuple[Dataset, Callable[[list[Any]], Any]]:
    """Return the rows as inputs of a model, and what makes a batch of some of them.

    classes: the model's class of each label. Texts are cut to `tokens` tokens and padded to the
    longest of their batch; for generation they are joined and cut into rows of just as many.
    """
    if task == "image-classification":
        image, label = rows.column_names
        options = {"image": image, "label": label, "processor": processor, "classes": classes}
        return rows.with_transform(partial(_pixels, **options)), default_data_collator
    processor = copy.deepcopy(processor)  # it remembers how it was called, and is saved at the end
    options = {"tokenizer": processor, "tokens": tokens}
    if task == "text-generation":
        encoded = _map(rows, _blocks, options)
        if not len(encoded):
            raise ValueError(f"the texts are too short for one row of {tokens}: lower --tokens")
        return encoded, default_data_collator
    return _map(rows, _words, {**options, "classes": classes}), DataCollatorWithPadding(processor)


def _map(rows: Dataset, function: Callable[..., Batch], options: dict[str, Any]) -> Dataset:
    return rows.map(
        function,
        batched=True,
        fn_kwargs={**options, "columns": rows.column_names},
        remove_columns=rows.column_names,
    )


def _words(
    batch: Batch, tokenizer: Any, tokens: int, classes: list[int], columns: list[str]
) -> Batch:
    *texts, label = columns
    _check(batch, texts)
    encoded = tokenizer(*(batch[text] for text in texts), truncation=True, max_length=tokens)
    return {**encoded, "labels": [classes[value] for value in batch[label]]}


def _blocks(batch: Batch, tokenizer: Any, tokens: int, columns: list[str]) -> Batch:
    _check(batch, columns)
    texts = [text + (tokenizer.eos_token or "") for text in batch[columns[0]]]
    ids = list(chain.from_iterable(tokenizer(texts)["input_ids"]))
    rows = [ids[i : i + tokens] for i in range(0, len(ids) - tokens + 1, tokens)]
    return {"input_ids": rows, "labels": rows}


def _pixels(batch: Batch, image: str, label: str, processor: Any, classes: list[int]) -> Batch:
    images = [picture.convert("RGB") for picture in batch[image]]
    pixels = processor(images, return_tensors="pt")["pixel_values"]
    return {"pixel_values": list(pixels), "labels": [classes[value] for value in batch[label]]}


def _check(batch: Batch, columns: list[str]) -> None:
    for column in columns:
        if None in batch[column]:
            raise ValueError(f"column {column!r} has rows without a text: leave them out")
