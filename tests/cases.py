"""Tiny models with a tokenizer or image processor, and data in files, for the command line."""

import csv
import hashlib
import json

import numpy as np
import torch
from models import MODELS, WORDS
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    PreTrainedTokenizerFast,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
)
from typer.testing import CliRunner

from quanttune import cli

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(WORDS - 4))]
PAD, CLS, SEP = 0, 2, 3


def run(*arguments):
    """Run `quanttune` in this process; errors are raised."""
    result = CliRunner().invoke(cli.app, [*map(str, arguments)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def tune(*arguments):
    return run("tune", *arguments)


def contents(folder):
    """Return the hash of every file of the final model."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (folder / "model").iterdir()
    }


def save_tokenizer(folder):
    """Save a tokenizer of whole words that encloses a text in [CLS] and [SEP]."""
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", SEP), ("[CLS]", CLS))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        eos_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    ).save_pretrained(folder)


def write_csv(path, header, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def some_words(count):
    return [f"w{i}" for i in torch.randint(WORDS - 4, (count,)).tolist()]


def bert_case(folder):
    """Pairs of texts of different lengths, whose labels are numbers."""
    MODELS["bert"]().model.save_pretrained(folder / "model")
    save_tokenizer(folder / "model")
    pairs = [(some_words(1 + i), some_words(3), i % 5) for i in range(6)]
    rows = [(" ".join(first), " ".join(second), label) for first, second, label in pairs]
    write_csv(folder / "data.csv", ("first", "second", "label"), rows)
    ids = [
        [CLS, *map(VOCABULARY.index, first), SEP, *map(VOCABULARY.index, second), SEP]
        for first, second, _ in pairs
    ]
    lengths = [len(row) for row in ids]
    batch = {
        "input_ids": [row + [PAD] * (max(lengths) - len(row)) for row in ids],
        "attention_mask": [[1] * n + [0] * (max(lengths) - n) for n in lengths],
        "token_type_ids": [
            [0] * (len(first) + 2) + [1] * (len(second) + 1) + [0] * (max(lengths) - n)
            for (first, second, _), n in zip(pairs, lengths, strict=True)
        ],
        "labels": [label for *_, label in pairs],
    }
    return "data.csv", 6, {name: torch.tensor(rows) for name, rows in batch.items()}


def opt_case(folder):
    """Texts that are joined, and cut into rows of 5 tokens; the rest is left out."""
    MODELS["opt"]().model.save_pretrained(folder / "model")
    save_tokenizer(folder / "model")
    texts = [some_words(3 + i) for i in range(4)]
    lines = [json.dumps({"text": " ".join(text)}) for text in texts]
    (folder / "data.jsonl").write_text("\n".join(lines))
    ids = []
    for text in texts:
        ids += [CLS, *map(VOCABULARY.index, text), SEP, SEP]  # the end of the text is a [SEP] too
    rows = torch.tensor(ids[: len(ids) // 5 * 5]).reshape(-1, 5)
    return "data.jsonl", len(rows), {"input_ids": rows, "labels": rows}


def vit_case(folder):
    """Images in folders that name two of the model's three labels, in another order."""
    shape = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 2}
    config = TimmWrapperConfig(
        architecture="vit_tiny_patch16_224",
        model_args=shape,
        id2label={0: "Cat", 1: "Dog", 2: "Ant"},
        label2id={"Cat": 0, "Dog": 1, "Ant": 2},
        pretrained_cfg={"input_size": (3, 16, 16), "mean": (0.5,) * 3, "std": (0.25,) * 3,
                        "crop_pct": 1.0, "interpolation": "bicubic"},
    )  # fmt: skip
    TimmWrapperForImageClassification(config).save_pretrained(folder / "model")
    pixels = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    for i, label in enumerate(["ant", "ant", "cat", "cat"]):
        (folder / "images" / label).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[i]).save(folder / "images" / label / f"{i}.png")
    images = (torch.tensor(pixels).permute(0, 3, 1, 2) / 255 - 0.5) / 0.25
    return "images", 4, {"pixel_values": images, "labels": torch.tensor([2, 2, 0, 0])}


LOADERS = {
    bert_case: "AutoModelForSequenceClassification",
    opt_case: "AutoModelForCausalLM",
    vit_case: "AutoModelForImageClassification",
}
