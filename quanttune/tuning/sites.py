"""Which modules are observed: every Linear, Conv1D and LayerNorm (section 4 of the paper)."""

import sys
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn


def find_sites(
    model: nn.Module, include: Sequence[str] = ("*",), exclude: Sequence[str] = ()
) -> dict[str, nn.Module]:
    """Return the observed modules by qualified name, each once.

    include, exclude: patterns of fnmatch over qualified names, such as "blocks.*.mlp.*".
    """
    sites = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, observed_types())
        and any(fnmatchcase(name, pattern) for pattern in include)
        and not any(fnmatchcase(name, pattern) for pattern in exclude)
    }
    if not sites:
        raise ValueError(
            f"no Linear, Conv1D or LayerNorm of {type(model).__name__} matches "
            f"include={list(include)} and exclude={list(exclude)}"
        )
    return sites


def observed_types() -> tuple[type[nn.Module], ...]:
    """Return the classes of observed modules; Conv1D is the transposed Linear of GPT-2."""
    transformers = sys.modules.get("transformers.pytorch_utils")
    return (nn.Linear, nn.LayerNorm, *([transformers.Conv1D] if transformers else []))


def find_heads(model: nn.Module) -> set[nn.Module]:
    """Return the heads that the model names itself, as timm and language models do.

    Their outputs are logits, on which a low ratio would mean an undecided model. Heads that a model
    does not name are found by their output being the model's own: see observers.py.
    """
    heads: set[nn.Module] = set()
    for getter in ("get_classifier", "get_output_embeddings"):
        if callable(method := getattr(model, getter, None)):
            found = method()
            heads.update(found if isinstance(found, tuple) else (found,))
    return {head for head in heads if isinstance(head, nn.Linear)}
