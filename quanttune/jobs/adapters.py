"""LoRA adapters on a model: trained in its place, and merged into it at the end."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from ..tuning.sites import LINEAR, find_heads, kind_of


def add_adapters(model: nn.Module, rank: int, drawn: Iterable[str]) -> PeftModel:
    """Freeze a model, and put an adapter on each of its Linear modules but those of the logits.

    An adapter adds B A x, without a scale, and starts at 0.

    Args:
        drawn: names of parameters that were drawn at random. What they belong to is trained whole.

    Raises:
        ValueError: one of them belongs to the model as a whole.
    """
    found = {name.rpartition(".")[0] for name in drawn}
    whole = sorted(part for part in found if not _is_within(part, found - {part}))
    if "" in whole:
        raise ValueError(
            f"the model's files lack weights that are {type(model).__name__}'s own, so that "
            "--lora-rank would train all of it: tune it without"
        )
    heads = find_heads(model)
    linear = {
        name: module
        for name, module in model.named_modules()
        if kind_of(module) == LINEAR and module not in heads and not _is_within(name, whole)
    }
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules="|".join(map(re.escape, linear)),
        modules_to_save=whole or None,
        fan_in_fan_out=not any(isinstance(module, nn.Linear) for module in linear.values()),
    )
    return get_peft_model(model, config)


def _is_within(name: str, parts: Iterable[str]) -> bool:
    return any(f"{name}.".startswith(f"{part}.") for part in parts)


def load_adapters(model: Any, checkpoint: Path) -> None:
    """Load what was trained of a model with adapters, from a checkpoint."""
    model.load_adapter(str(checkpoint), "default", is_trainable=True)


def merged(model: Any) -> nn.Module:
    """Return the model that adapters were put on, with them in its weights."""
    plain: nn.Module = model.merge_and_unload()
    return plain
