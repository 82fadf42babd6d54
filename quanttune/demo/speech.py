"""Speech without a download: sentences of docstrings, spoken by espeak-ng."""

import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from . import docstrings

RATE = 16_000  # Hz, of what Whisper hears
SENTENCES = 4  # per row: a paragraph of some 13 seconds; single sentences are harder to make out
COMMON = 25  # docstrings that a word must be in, which names of variables are not
_SENTENCE = re.compile(r"(?<!\S)[A-Z][a-z]+(?:,? [a-z]+){6,17}\.(?!\S)")
_ENGLISH_US = "en-us"


@dataclass(frozen=True)
class Row:
    """What was said, and its wave: 16 kHz, float32 between -1 and 1."""

    text: str
    wave: Any


def load(wanted: dict[str, int], seconds: float) -> dict[str, list[Row]]:
    """Return paragraphs of plain sentences, spoken, as many of each split as are wanted.

    No module is in two splits, no sentence in two rows; what takes longer than `seconds` is left
    out.

    Raises:
        FileNotFoundError: espeak-ng is not installed.
        ValueError: there is too little text.
    """
    rows = {}
    for split, sentences in _sentences().items():
        spoken = (Row(text, _say(text)) for text in _paragraphs(sentences))
        fitting = (row for row in spoken if len(row.wave) <= seconds * RATE)
        rows[split] = list(islice(fitting, wanted[split]))
        if len(rows[split]) < wanted[split]:
            raise ValueError(
                f"the docstrings make {len(rows[split])} {split} rows, {wanted[split]} are needed"
            )
    return rows


def _paragraphs(sentences: list[str]) -> Iterator[str]:
    for i in range(0, len(sentences) - SENTENCES + 1, SENTENCES):
        yield " ".join(sentences[i : i + SENTENCES])


def _sentences() -> dict[str, list[str]]:
    with docstrings._no_garbage_collection():
        texts = list(docstrings._docstrings())
    known = Counter(word for _, text in texts for word in _words(text))
    splits: dict[str, list[str]] = {"tuning": [], "validation": [], "test": []}
    seen: set[str] = set()
    for split, text in texts:
        for sentence in _plain(text):
            if sentence not in seen and all(known[word] >= COMMON for word in _words(sentence)):
                seen.add(sentence)
                splits[split].append(sentence)
    return splits


def _plain(text: str) -> Iterator[str]:
    for paragraph in re.split(r"\n\s*\n", text):
        yield from _SENTENCE.findall(" ".join(paragraph.split()))


def _words(text: str) -> set[str]:
    return set(re.findall("[a-z]+", text.lower()))


def _say(text: str) -> Any:
    from scipy.io import wavfile
    from scipy.signal import resample_poly

    with TemporaryDirectory() as folder:
        file = Path(folder) / "speech.wav"
        try:
            command = ["espeak-ng", "-v", _ENGLISH_US, "-w", str(file), text]
            subprocess.run(command, check=True, capture_output=True)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                "the whisper demo has its sentences spoken by espeak-ng: apt install espeak-ng"
            ) from error
        rate, wave = wavfile.read(file)
    wave = resample_poly(wave / np.iinfo(wave.dtype).max, RATE, rate)  # divides by what both share
    return wave.astype(np.float32)
