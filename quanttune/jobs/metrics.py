"""What a model is measured by: what is kept of each batch, and the number that all of it makes."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from sklearn.metrics import f1_score, matthews_corrcoef
from torch import Tensor, nn
from torch.nn import functional as F

from .encoding import IGNORED

SPARE = 8  # tokens: of a start and an end, and for short labels

Kept = tuple[Any, Any]  # tensors, or lists of the tokens of texts


def _labels(model: nn.Module, batch: dict[str, Tensor]) -> Kept:
    """Return the class that each row gets, and its label."""
    labels = batch.pop("labels")
    return model(**batch).logits.argmax(-1), labels


def _per_cent(right: Tensor) -> float:
    return 100 * int(right.sum()) / len(right)


def _accuracy(found: Tensor, labels: Tensor) -> float:
    return _per_cent(found == labels)


def _f1(found: Tensor, labels: Tensor) -> float:
    return 100 * float(f1_score(labels == 1, found == 1, zero_division=0.0))


def _matthews(found: Tensor, labels: Tensor) -> float:
    if len(torch.cat([found, labels]).unique()) == 1:
        return 0.0  # which is what scikit-learn says, with a warning
    return 100 * float(matthews_corrcoef(labels, found))


def _scores(model: nn.Module, batch: dict[str, Tensor]) -> Kept:
    """Return the number that each row gets, and its label."""
    labels = batch.pop("labels")
    return model(**batch).logits.squeeze(-1).double(), labels.double()


def _pearson(found: Tensor, labels: Tensor) -> float:
    if not (found.std() and labels.std()):
        return 0.0  # who always says the same says nothing
    return 100 * float(torch.corrcoef(torch.stack([found, labels]))[0, 1])


def _losses(model: nn.Module, batch: dict[str, Tensor]) -> Kept:
    """Return the sum of the losses of a batch, and how many tokens they are of."""
    labels = batch.pop("labels")[:, 1:]
    logits = model(**batch).logits[:, :-1].float()
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    return loss.double()[None], torch.tensor([labels.numel()])


def _perplexity(losses: Tensor, tokens: Tensor) -> float:
    return (losses.sum() / tokens.sum()).exp().item()


def _last_words(model: nn.Module, batch: dict[str, Tensor]) -> Kept:
    """Return for each row whether all tokens of its last word are the likeliest, and the last."""
    labels = batch.pop("labels")[:, 1:]
    right = model(**batch).logits[:, :-1].argmax(-1) == labels
    last = (labels != IGNORED).cumsum(1).argmax(1, keepdim=True)
    return (right | (labels == IGNORED)).all(1), right.gather(1, last).squeeze(1)


def _last_word(words: Tensor, tokens: Tensor) -> float:
    return _per_cent(words)


def _last_token(words: Tensor, tokens: Tensor) -> float:
    return _per_cent(tokens)


def _texts(model: Any, batch: dict[str, Tensor]) -> Kept:
    """Return the tokens that the model writes for each row, the likeliest each, and the labels.

    It may write twice as many as the longest label has, and a few more.
    """
    labels = batch["labels"]
    read = {name: batch[name] for name in ("input_ids", "attention_mask")}
    room = 2 * labels.shape[1] + SPARE
    found = model.generate(**read, do_sample=False, num_beams=1, max_new_tokens=room)
    return found[:, 1:].tolist(), [[i for i in row if i != IGNORED] for row in labels.tolist()]


def _exact_match(found: list[str], wanted: list[str]) -> float:
    return 100 * sum(map(str.__eq__, found, wanted)) / len(wanted)


def _bleu(found: list[str], wanted: list[str]) -> float:
    from sacrebleu import corpus_bleu

    return float(corpus_bleu(found, [wanted]).score)


def _word_error_rate(found: list[str], wanted: list[str]) -> float:
    from jiwer import wer

    return 100 * float(wer(wanted, found))


@dataclass(frozen=True)
class Metric:
    """A number that a model gets for many rows.

    Args:
        kind: of the task, classification, regression, generation or text2text.
        keep: takes a model and a batch; returns two tensors, or lists of tokens, that are joined
            over the batches.
        score: makes the number of both; of tokens it gets the texts.
        less_is_better: what the number means.
    """

    kind: str
    keep: Callable[[nn.Module, dict[str, Tensor]], Kept]
    score: Callable[[Any, Any], float]
    less_is_better: bool = False


# The first of a kind is measured where none is named. All are times 100, but for perplexity.
METRICS = {
    "accuracy": Metric("classification", _labels, _accuracy),
    "f1": Metric("classification", _labels, _f1),
    "matthews_correlation": Metric("classification", _labels, _matthews),
    "pearson": Metric("regression", _scores, _pearson),
    "perplexity": Metric("generation", _losses, _perplexity, less_is_better=True),
    "last_word": Metric("generation", _last_words, _last_word),
    "last_token": Metric("generation", _last_words, _last_token),
    "exact_match": Metric("text2text", _texts, _exact_match),
    "bleu": Metric("text2text", _texts, _bleu),
    "word_error_rate": Metric("text2text", _texts, _word_error_rate, less_is_better=True),
}
LAST_WORDS = frozenset(name for name, metric in METRICS.items() if metric.keep is _last_words)

# the subsets of GLUE that are judged by more than, or other than, the accuracy
GLUE = {"cola": ("matthews_correlation",), "mrpc": ("accuracy", "f1"), "qqp": ("accuracy", "f1")}


def choose(task: str, subset: str | None, asked: Sequence[str], labels: int) -> tuple[str, ...]:
    """Return the names of the metrics: those asked for, or GLUE's of its subset, or the task's.

    Args:
        labels: how many the model has.

    Raises:
        ValueError: the task has no such metric, or they cannot be measured together.
    """
    kind = "text2text" if task == "text2text-generation" else task.rpartition("-")[2]
    known = [name for name, metric in METRICS.items() if metric.kind == kind]
    by_itself = GLUE.get(subset or "") if task == "text-classification" else None
    names = tuple(dict.fromkeys(asked)) or by_itself or (known[0],)
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"a metric of {task} is one of {', '.join(known)}, got {unknown[0]!r}")
    if len({METRICS[name].keep for name in names}) > 1:
        raise ValueError(
            f"{' and '.join(names)} are of other rows, joined texts and single ones: measure them "
            "one after the other"
        )
    if "f1" in names and labels != 2:
        raise ValueError(f"f1 is of two labels, the model has {labels}")
    return names


@torch.no_grad()
def measure(
    names: Sequence[str],
    model: nn.Module,
    batches: Iterable[dict[str, Tensor]],
    tokenizer: Any = None,
) -> dict[str, float]:
    """Return the numbers of a model by the names of their metrics, which keep the same.

    f1 is that of the model's class 1, as in GLUE. Those of texts want the tokenizer.
    """
    keep = METRICS[names[0]].keep
    if keep is _texts:
        found, wanted = (
            tokenizer.batch_decode(list(chain.from_iterable(parts)), skip_special_tokens=True)
            for parts in zip(*(keep(model, batch) for batch in batches), strict=True)
        )
        return {name: METRICS[name].score(found, wanted) for name in names}
    kept = [[part.cpu() for part in keep(model, batch)] for batch in batches]
    first, second = (torch.cat(parts) for parts in zip(*kept, strict=True))
    return {name: METRICS[name].score(first, second) for name in names}
