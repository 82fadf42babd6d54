"""Models of transformers, and of timm by way of transformers, for four tasks."""

import copy
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import logging, set_seed
from transformers.models.auto import modeling_auto

from ..quantization import pretrained as pretrained  # so that quantized models can be loaded
from ..quantization.state import is_quantized
from .settings import Settings

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
    "text2text-generation": (
        "AutoModelForSeq2SeqLM",
        modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
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
    """Return the configuration of a model, without its weights.

    Raises:
        ValueError: there is no such model; it says what there is.
    """
    folder = Path(model)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ValueError(f"{model} holds no model: config.json is missing")
    if (folder / "model" / "config.json").is_file() and (folder / "metrics.jsonl").exists():
        raise ValueError(f"{model} is the folder of a run: its model is {folder / 'model'}")
    try:
        config = transformers.AutoConfig.from_pretrained(model)
    except OSError as error:
        if folder.exists():
            raise
        raise ValueError(
            f"there is no model {model}: no folder is called so, timm knows no such name, and "
            "nothing can be had by it from the Hugging Face Hub"
        ) from error
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

    Labels are matched by their names, ImageNet's also by the ids of its classes. Numbers that the
    model does not have as names are its classes; any names are, in their order, where the model's
    say nothing (LABEL_0, ...) and are as many.
    """
    if not is_for(config, task):
        return []
    known = [name.casefold() for name in names_of(config)]
    wanted = [name.casefold() for name in names]
    if wanted == known:
        return list(range(len(names)))
    if found := _by_name(known, wanted):
        return found
    if numbered and max(map(int, names)) < len(known):
        return list(map(int, names))
    if is_nameless(config) and len(known) == len(names):
        return list(range(len(names)))
    if len(known) == 1000 and are_ids_of_imagenet(names):
        from timm.data import ImageNetInfo

        return _by_name(ImageNetInfo().label_names(), wanted)
    return []


def names_of(config: Any) -> list[str]:
    """Return what the classes of a model are called."""
    return [str(config.id2label[i]) for i in range(config.num_labels)]


def is_nameless(config: Any) -> bool:
    """Tell whether the names of a model's classes are those that transformers makes up."""
    return all(re.fullmatch(r"LABEL_\d+", name, re.IGNORECASE) for name in names_of(config))


def are_ids_of_imagenet(names: list[str]) -> bool:
    return all(re.fullmatch(r"n\d{8}", name) for name in names)


def _by_name(known: list[str], wanted: list[str]) -> list[int]:
    if len(set(known)) == len(known) and set(wanted) <= set(known):
        return [known.index(name) for name in wanted]
    return []


def name_classes(config: Any, names: list[str]) -> None:
    """Give the model's classes names, which its configuration keeps."""
    config.id2label = dict(enumerate(names))
    config.label2id = {name: i for i, name in enumerate(names)}


def replace_labels(config: Any, names: list[str]) -> list[int]:
    """Give the model the labels of the data, and return its classes of them."""
    name_classes(config, names)
    if getattr(config, "problem_type", None):
        config.problem_type = "single_label_classification"
    return list(range(len(names)))


def expect_score(config: Any) -> None:
    """Give the model a head of one number, which is trained by its squared error."""
    config.num_labels = 1
    config.problem_type = "regression"


def load_model(model: str, config: Any, task: str) -> tuple[nn.Module, list[str]]:
    """Return the model for a task in float32, and which of its weights are drawn at random.

    Those are what the files do not have, or in another size, such as a new head.
    """
    loader = getattr(transformers, TASKS[task][0])
    loaded, found = loader.from_pretrained(
        model,
        config=config,
        dtype=torch.float32,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    mismatched = {name for name, *_ in found["mismatched_keys"]}
    return loaded, sorted({*found["missing_keys"], *mismatched})


def longest(config: Any, tokenizer: Any) -> int:
    """Return how many tokens a model takes at once."""
    return int(min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", 1 << 30)))


def load_processor(model: str, task: str) -> Any:
    """Return what makes a model's inputs: its tokenizer, or its image processor."""
    if task == "image-classification":
        return transformers.AutoImageProcessor.from_pretrained(model)
    return transformers.AutoTokenizer.from_pretrained(model)


@dataclass(frozen=True)
class ModelSource:
    """Where a model is, and what it is for."""

    name: str
    config: Any
    task: str

    @property
    def origin(self) -> dict[str, Any]:
        return {"name": self.name, "revision": getattr(self.config, "_commit_hash", None)}

    @property
    def is_quantized(self) -> bool:
        return getattr(self.config, "quantization_config", None) is not None

    def load(self, seed: int, quantized: bool = True) -> nn.Module:
        """Return the model in evaluation mode, on the GPU if there is one.

        quantized: False takes the weights of a quantized model in float, as methods left them, and
            nothing else: it may answer otherwise than the model that was quantized, as fast.

        Raises:
            ValueError: the model's files lack some of its weights.
        """
        config = copy.deepcopy(self.config)
        if not quantized and self.is_quantized:
            del config.quantization_config
        set_seed(seed)
        before = logging.get_verbosity()
        if not quantized:
            logging.set_verbosity_error()  # that the scales are not used is no news
        try:
            model, drawn = load_model(self.name, config, self.task)
        finally:
            logging.set_verbosity(before)
        if drawn:
            raise ValueError(
                f"{self.name} lacks weights of {type(model).__name__}, which would be random: "
                f"{', '.join(drawn[:3])}, {len(drawn)} in all"
            )
        return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()

    def load_float(self, seed: int) -> nn.Module:
        """Return the model as `load` does, which must not be quantized yet.

        Raises:
            ValueError: it is, or its files lack some of its weights.
        """
        model = self.load(seed)
        if is_quantized(model):
            raise ValueError(f"{self.name} is quantized already: give the float model")
        return model


def find_model(settings: Settings) -> ModelSource:
    """Return the model of a run, which is not loaded yet."""
    name = resolve(settings.model)
    config = load_config(name)
    return ModelSource(name, config, task_of(config, settings.task))
