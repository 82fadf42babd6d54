"""The model and data of a recipe, to be analysed. Quality is measured on validation rows."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from ..analysis.subject import Subject
from . import NAMES, recipe


def recipe_subject(
    model: str | None, compare: Sequence[str] = (), seed: int = 0
) -> tuple[Subject, dict[str, nn.Module]]:
    """Return a recipe's subject, and the models to compare it with.

    Args:
        model: the name of a recipe, or an encoder to take in MiniLM's place.
        compare: names of arms, which are tuned for it, or other encoders.
    """
    is_recipe = model is None or model in NAMES
    name = model if model and is_recipe else "minilm"
    job = recipe(name)(seed) if is_recipe else recipe(name)(seed, model=model)
    arms = {arm.name: arm for arm in job.arms}
    facts = {
        "data": f"tuning rows of the {name} recipe, seed {seed}; quality on its validation rows",
        "notes": " ".join(job.caveats),
        **{other: arms[other].summary for other in compare if other in arms},
    }
    subject = Subject(
        name if is_recipe else Path(str(model)).name,
        job.prepare(arms["base"], lambda: None),
        job.calibration(),
        *_quality(job),
        _tokenizer(model if not is_recipe else None) if name == "minilm" else None,
        facts,
    )
    others = {
        Path(other).name: job.prepare(arms[other], lambda: None)
        if other in arms
        else _encoder(name, other, list(arms))
        for other in compare
    }
    return subject, others


def _quality(job: Any) -> tuple[str, Callable[[nn.Module], float]]:
    """Return the metric of a job and how it is measured, so that more is better."""
    measure = partial(job.evaluate, split="validation")
    if job.metric == "perplexity":
        return "probability of the next token", lambda model: 100 / measure(model)
    if job.metric == "word error rate":
        return "words that are not in error", lambda model: 100 - measure(model)
    return job.metric, measure


def _tokenizer(model: str | None) -> Any:
    from transformers import AutoTokenizer

    from .minilm import packaged_model

    return AutoTokenizer.from_pretrained(model or packaged_model())


def _encoder(name: str, path: str, arms: list[str]) -> nn.Module:
    from .minilm import load_encoder

    if name != "minilm" or not Path(path).exists():
        kinds = f"one of {', '.join(arms)}" + (", or a folder" if name == "minilm" else "")
        raise ValueError(f"compare {name} with {kinds}, got {path!r}")
    return load_encoder(path)
