"""Models of transformers, and of timm by way of transformers, for three tasks."""

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto

from ..quantization import pretrained as pretrained  # so that quantized models can be loaded

# the class that loads a model for a task, and the architectures that are for it already
TASKS = {
    "text-classification": (
        "AutoModelForSequenceClassification",
        modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    ),
    "text-generation": (
        "AutoModelForCausalLM",
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    ),
    "image-classification": (
        "AutoModelForImageClassification",
        modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    ),
}


def resolve(model: str) -> str:
    """Return a folder or a Hugging Face id; a name of timm becomes the id of its weights."""
    name = model.removeprefix("timm/")
    if Path(model).exists() or "/" in name or not find_spec("timm"):
        return model
    import timm

    if not timm.is_model(name):
        return model
    pretrained = timm.get_pretrained_cfg(name)
    if not (pretrained and pretrained.hf_hub_id):
        raise ValueError(f"timm has no pretrained weights of {name} to start from")
    return str(pretrained.hf_hub_id)


def load_config(model: str) -> Any:
    """Return the configuration of a model, without its weights."""
    config = transformers.AutoConfig.from_pretrained(model)
    # a folder that timm wrote has it twice, which transformers hands to timm twice
    (getattr(config, "model_args", None) or {}).pop("num_classes", None)
    return config


def is_for(config: Any, task: str) -> bool:
    """Tell whether the model was made for a task, so that it has a head for it."""
    if config.model_type == "timm_wrapper":  # timm's own files name no class
        return task == "image-classification"
    return any(name in TASKS[task][1].values() for name in config.architectures or ())


def task_of(config: Any, task: str | None) -> str:
    """Return the task, which is that of the model's architecture unless it is given."""
    if task is None:
        for known in TASKS:
            if is_for(config, known):
                return known
        made_for = ", ".join(config.architectures or ["no architecture"])
        raise ValueError(
            f"the model's configuration names {made_for}, which does not tell the task: give "
            f"--task, one of {', '.join(TASKS)}"
        )
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    return task


def match_labels(config: Any, task: str, names: list[str], numbered: bool) -> list[int]:
    """Return the model's class of each label of the data; none if it needs another head.

    Labels are matched by their names, ImageNet's also by the ids of its classes. Numbers, and any
    names if the model's say nothing (LABEL_0, ...), are taken as they are.
    """
    if not is_for(config, task):
        return []
    known = [str(config.id2label[i]).casefold() for i in range(config.num_labels)]
    wanted = [name.casefold() for name in names]
    nameless = all(re.fullmatch(r"label_\d+", name) for name in known)
    if wanted == known or (nameless and len(known) == len(names)):
        return list(range(len(names)))
    if numbered and len(names) <= len(known):
        return list(range(len(names)))
    if len(known) == 1000 and all(re.fullmatch(r"n\d{8}", name) for name in names):
        from timm.data import ImageNetInfo

        known = ImageNetInfo().label_names()
    if len(set(known)) == len(known) and set(wanted) <= set(known):
        return [known.index(name) for name in wanted]
    return []


def replace_labels(config: Any, names: list[str]) -> list[int]:
    """Give the model the labels of the data, and return its classes of them."""
    config.id2label = dict(enumerate(names))
    config.label2id = {name: i for i, name in enumerate(names)}
    if getattr(config, "problem_type", None):
        config.problem_type = "single_label_classification"
    return list(range(len(names)))


def load_model(model: str, config: Any, task: str) -> nn.Module:
    """Return the model for a task in float32, with a new head where its own has another size."""
    loader = getattr(transformers, TASKS[task][0])
    loaded: nn.Module = loader.from_pretrained(
        model, config=config, dtype=torch.float32, ignore_mismatched_sizes=True
    )
    return loaded


def longest(config: Any, tokenizer: Any) -> int:
    """Return how many tokens a model takes at once."""
    return int(min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", 1 << 30)))


def load_processor(model: str, task: str) -> Any:
    """Return what makes a model's inputs: its tokenizer, or its image processor."""
    if task == "image-classification":
        return transformers.AutoImageProcessor.from_pretrained(model)
    return transformers.AutoTokenizer.from_pretrained(model)
