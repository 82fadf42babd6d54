"""The numbers of `quanttune evaluate`: hand-worked, and against NumPy and plain loops."""

import datasets
import numpy as np
import pytest
import torch
from cases import CLS, VOCABULARY, save_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.modeling_outputs import SequenceClassifierOutput

from quanttune.jobs.encoding import IGNORED, encode
from quanttune.jobs.metrics import choose, measure


class Classifier(nn.Module):
    """Says what it is given."""

    def forward(self, said):
        return SequenceClassifierOutput(logits=nn.functional.one_hot(said, 3).float())


def judge(names, said, labels, size=4):
    pairs = zip(torch.tensor(said).split(size), torch.tensor(labels).split(size), strict=True)
    batches = [{"said": said, "labels": labels} for said, labels in pairs]
    return measure(names, Classifier(), batches)


ALL = ["accuracy", "f1", "matthews_correlation"]


def test_a_hand_worked_case():
    """3 true and 1 false positive, 1 false and 1 true negative: MCC = (3 * 1 - 1) / 8."""
    found = judge(ALL, [1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 1, 0])
    assert found == pytest.approx(
        {"accuracy": 100 * 4 / 6, "f1": 75, "matthews_correlation": 25}, rel=1e-12
    )
    assert judge(["f1"], [0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 0, 1]) == {"f1": 50}


def test_matthews_correlation_is_that_of_the_numbers():
    said, labels = np.random.default_rng(0).integers(0, 2, (2, 101)).tolist()
    found = judge(["matthews_correlation"], said, labels)["matthews_correlation"]
    assert found == pytest.approx(100 * np.corrcoef(said, labels)[0, 1], rel=1e-9)


@pytest.mark.parametrize("said", [0, 1, 2])
def test_a_model_that_always_says_the_same_is_worth_nothing(said):
    found = judge(ALL, [said] * 6, [0, 0, 0, 0, 0, 0])
    assert found == {"accuracy": 100 * (said == 0), "f1": 0, "matthews_correlation": 0}


@pytest.mark.parametrize(
    ("task", "subset", "asked", "expected"),
    [
        ("text-classification", "cola", [], ("matthews_correlation",)),
        ("text-classification", "mrpc", [], ("accuracy", "f1")),
        ("text-classification", "qqp", [], ("accuracy", "f1")),
        ("text-classification", "sst2", [], ("accuracy",)),
        ("text-classification", None, [], ("accuracy",)),
        ("text-classification", "cola", ["f1", "accuracy", "f1"], ("f1", "accuracy")),
        ("image-classification", "cola", [], ("accuracy",)),
        ("text-generation", "cola", [], ("perplexity",)),
        ("text-generation", None, ["last_token", "last_word"], ("last_token", "last_word")),
    ],
)
def test_metrics_of_a_task(task, subset, asked, expected):
    assert choose(task, subset, asked, 2) == expected


@pytest.mark.parametrize(
    ("task", "asked", "message"),
    [
        ("text-generation", ["f1"], "one of perplexity, last_word, last_token, got 'f1'"),
        ("image-classification", ["last_word"], "one of accuracy, f1, matthews_correlation, got"),
        ("text-generation", ["last_word", "perplexity"], "last_word and perplexity are of other"),
        ("text-classification", ["accuracy", "f1"], "f1 is of two labels, the model has 3"),
    ],
)
def test_metrics_that_a_task_does_not_have(task, asked, message):
    with pytest.raises(ValueError, match=message):
        choose(task, None, asked, 3)


# ------------------------------------------------------------------ last words


@pytest.fixture
def words(tmp_path):
    """Return a tokenizer of whole words that encloses a text in [CLS] and [SEP]."""
    save_tokenizer(tmp_path)
    return AutoTokenizer.from_pretrained(tmp_path)


@pytest.fixture
def letters():
    """Return a tokenizer of single bytes, but for a c after a space."""
    alphabet = {letter: i for i, letter in enumerate(["Ġ", *"abcdefgh", "Ġc"])}
    tokenizer = Tokenizer(models.BPE(alphabet, [("Ġ", "c")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="h")


def encoded(texts, tokenizer, tokens=16):
    rows = datasets.Dataset.from_dict({"text": texts})
    rows, collate = encode(rows, "text-generation", tokenizer, [], tokens, True)
    return rows, {name: values.tolist() for name, values in collate(list(rows)).items()}


_ = IGNORED


def test_a_row_ends_with_its_last_word_and_keeps_its_end(words):
    w = VOCABULARY.index
    rows, batch = encoded(["w1 w2 w3", " w4  w5\n"], words)
    assert batch["input_ids"] == [[CLS, w("w1"), w("w2"), w("w3")], [CLS, w("w4"), w("w5"), 0]]
    assert batch["labels"] == [[_, _, _, w("w3")], [_, _, w("w5"), _]]
    assert batch["attention_mask"] == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert set(rows.column_names) == set(batch)
    _rows, batch = encoded(["w1 w2 w3", "w4 w5"], words, tokens=4)  # [CLS] and [SEP] count
    assert batch["input_ids"] == [[CLS, w("w2"), w("w3")], [CLS, w("w4"), w("w5")]]
    assert words.truncation_side == "right"  # the one that is saved is as it was


def test_tokens_of_a_last_word_may_have_the_space_before_it(letters):
    _rows, batch = encoded(["ab cd", "a bee", "aaa ccc"], letters)
    assert batch["labels"] == [
        [_, _, 9, 4, _, _],  # a b Ġc d
        [_, _, 2, 5, 5, _],  # a Ġ b e e
        [_, _, _, 9, 3, 3],
    ]
    assert batch["input_ids"] == [[1, 2, 9, 4, 8, 8], [1, 0, 2, 5, 5, 8], [1, 1, 1, 9, 3, 3]]


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize(
    ("text", "tokens"), [("", 16), ("  ", 16), ("ab", 16), ("ab !", 16), ("ab cde", 3)]
)
def test_a_last_word_needs_others_and_room(text, tokens, prefix, letters):
    if prefix:
        begin = processors.TemplateProcessing("h $A", special_tokens=[("h", 8)])
        letters.backend_tokenizer.post_processor = begin
    with pytest.raises(ValueError, match="needs words before it, and all of it within --tokens"):
        encoded([text], letters, tokens)


def test_last_words_need_to_know_where_tokens_stand(letters, monkeypatch):
    monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", False)
    with pytest.raises(ValueError, match="tells where tokens stand, got"):
        encoded(["ab cd"], letters)
