"""How the models of the rows come to be: as they are, or tuned with or without the outlier loss."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from torch import nn

from ...progress import Progress
from ...trainer.checkpoint import load_weights
from ...tuning.quiet_attention import clip_softmax, gate_attention
from .. import checkpoints, models
from ..publication import remove
from ..settings import Settings
from ..tune import tune
from .inputs import Inputs
from .ways import BASE, CONTROL, TUNED

WARM_UP = 0.05  # of the steps
KEYS_SHARE = 12  # Quantizable Transformers' alpha, for OPT

Change = Callable[[Any], Any]


def _clipped(model: Any) -> Any:
    is_opt = model.config.model_type == "opt"
    return clip_softmax(model, alpha=KEYS_SHARE) if is_opt else clip_softmax(model)


def _unchanged(model: Any) -> Any:
    return model


CHANGES: dict[str, Change] = {"clipped_softmax": _clipped, "gated_attention": gate_attention}


@dataclass(frozen=True)
class Budget:
    """How much is tuned.

    Args:
        steps: in place of epochs.
    """

    epochs: float
    learning_rate: float
    batch_size: int
    steps: int | None = None

    def steps_for(self, rows: int) -> int:
        return self.steps or max(1, math.ceil(self.epochs * rows / self.batch_size))


def why_not(name: str, inputs: Inputs) -> str:
    """Return why a model cannot have an arm's attention; "" if it can."""
    if name not in CHANGES:
        return ""
    source = inputs.learning
    model, _ = models.load_model(source.name, copy.deepcopy(source.config), source.task)
    try:
        CHANGES[name](model)
    except ValueError as error:
        return str(error)
    return ""


def load_arm(
    name: str,
    settings: Settings,
    inputs: Inputs,
    budget: Budget,
    folder: Path,
    progress: Progress,
) -> nn.Module:
    """Return the model of an arm in evaluation mode; one that is tuned is kept in a folder.

    A model that has no head for the task is, as the base, tuned as the control is.
    """
    if name == BASE and inputs.has_head:
        return inputs.learning.load_float(settings.seed)
    name = CONTROL if name == BASE else name
    run, change = folder / f"{name}-seed{settings.seed}", CHANGES.get(name, _unchanged)
    steps = budget.steps_for(len(inputs.learning.rows))
    _, _, alpha = name.partition(TUNED)
    told = replace(
        settings,
        steps=steps,
        batch_size=budget.batch_size,
        learning_rate=budget.learning_rate,
        tuning={"alpha": float(alpha or 0)},
        trainer={
            "warmup_steps": str(round(WARM_UP * steps)),
            "lr_scheduler_type": "cosine",
            "weight_decay": "0.01",
        },
    )
    tune(
        told,
        run,
        resume=True,
        say=lambda line: None,
        progress=lambda step, loss: progress(f"tuning {name}", step, steps),
        inputs=inputs.learning,
        change=change,
    )
    for path in chain(*checkpoints.find(run)):
        remove(path)  # what a finished run does not need: three times the model, each
    model = str(run / "model")
    source = replace(inputs.learning, name=model, config=models.load_config(model))
    found = source.load_float(settings.seed)
    if name in CHANGES:
        change(found)
        load_weights(found, run / "model")
    return found
