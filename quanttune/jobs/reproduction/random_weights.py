"""Models of the tables with random weights, to try a command on without any download."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
)

from .. import checkpoints
from ..publication import partial_of, remove
from ..rows import Dataset, labels_of, load_rows
from ..settings import Settings

PAD, UNKNOWN, START, END = "[PAD]", "[UNK]", "[CLS]", "[SEP]"
PIECES = 8000
PIXELS = ("input_size", "mean", "std", "crop_pct", "crop_mode", "interpolation")
OPT_350M: dict[str, Any] = {
    "hidden_size": 1024,
    "word_embed_proj_dim": 512,
    "ffn_dim": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "do_layer_norm_before": False,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
BERT_BASE: dict[str, Any] = {"pad_token_id": 0}


def write_random(settings: Settings, folder: Path) -> None:
    """Write a model like `settings.model` to a folder, unless it is there, for rows like the data.

    Its weights are drawn by seed 0; its classes, or its words, are those of the data.
    """
    if checkpoints.is_complete(folder):
        return
    rows = load_rows(settings, str(settings.task))
    torch.manual_seed(0)
    partial = partial_of(folder)
    if partial.exists():  # from a process that was killed
        remove(partial)
    for part in MAKERS[str(settings.task)](settings.model, rows):
        part.save_pretrained(partial)
    partial.replace(folder)
    checkpoints.mark(folder)


def _image_classifier(origin: str, rows: Dataset) -> Iterator[Any]:
    names = labels_of(rows).names
    shape = timm.get_pretrained_cfg(origin).to_dict()
    config = TimmWrapperConfig(
        architecture=origin.partition(".")[0],
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
        pretrained_cfg={key: shape[key] for key in PIXELS},
    )
    yield _loud(TimmWrapperForImageClassification(config))


def _bert(origin: str, rows: Dataset) -> Iterator[Any]:
    tokenizer = _tokenizer(rows)
    tokenizer.post_processor = processors.BertProcessing((END, 3), (START, 2))
    yield _loud(BertForMaskedLM(BertConfig(**BERT_BASE)))
    yield _fast(tokenizer, cls_token=START, sep_token=END)


def _opt(origin: str, rows: Dataset) -> Iterator[Any]:
    tokenizer = _tokenizer(rows)
    yield _loud(OPTForCausalLM(OPTConfig(**OPT_350M)))
    yield _fast(tokenizer, bos_token=START, eos_token=END)


MAKERS: dict[str, Callable[[str, Dataset], Iterator[Any]]] = {
    "image-classification": _image_classifier,
    "text-classification": _bert,
    "text-generation": _opt,
}


def _tokenizer(rows: Dataset) -> Tokenizer:
    """Return a tokenizer of pieces of the rows' words."""
    tokenizer = Tokenizer(models.WordPiece(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    texts = (
        str(text)
        for batch in rows.iter(batch_size=1000)
        for name in rows.column_names
        for text in batch[name]
    )
    special = [PAD, UNKNOWN, START, END]
    trainer = trainers.WordPieceTrainer(vocab_size=PIECES, special_tokens=special)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _fast(tokenizer: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, unk_token=UNKNOWN, **special
    )


def _loud(model: nn.Module) -> nn.Module:
    """Draw weights large enough to matter: what libraries begin with answers alike to all."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, 0, parameter.shape[-1] ** -0.5)
    return model
