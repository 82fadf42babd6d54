"""Which modules are observed: by default every Linear, Conv1D and LayerNorm, as in the paper."""

import sys
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from .adapters import base_of, merged_modules

LINEAR, LAYER_NORM, RMS_NORM = "linear", "layer_norm", "rms_norm"
KINDS = {LINEAR: "Linear, Conv1D", LAYER_NORM: "LayerNorm", RMS_NORM: "RMSNorm"}
PAPER = (LINEAR, LAYER_NORM)


def find_sites(
    model: nn.Module,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    kinds: Sequence[str] = PAPER,
) -> dict[str, nn.Module]:
    """Return the observed modules by qualified name, each once.

    include, exclude: patterns of fnmatch over qualified names, such as "blocks.*.mlp.*".
    """
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f"sites must be some of {', '.join(KINDS)}, got {kind!r}")
    sites = {
        name: module
        for name, module in merged_modules(model)
        if kind_of(module) in kinds
        and any(fnmatchcase(name, pattern) for pattern in include)
        and not any(fnmatchcase(name, pattern) for pattern in exclude)
    }
    if not sites:
        raise ValueError(
            f"no {' or '.join(KINDS[kind] for kind in kinds)} of {type(model).__name__} matches "
            f"include={list(include)} and exclude={list(exclude)}"
        )
    return sites


def find_unobserved(
    model: nn.Module, include: Sequence[str], exclude: Sequence[str], kinds: Sequence[str]
) -> list[str]:
    """Return the modules that hold several matrices in one parameter, as experts do, by name.

    They multiply in a function of their own, which no hook sees.
    """
    known = (nn.modules.conv._ConvNd, nn.Bilinear)
    return [
        name
        for name, module in merged_modules(model)
        if LINEAR in kinds
        and not isinstance(module, known)
        and any(p.dim() == 3 and min(p.shape) > 1 for p in module.parameters(recurse=False))
        and any(fnmatchcase(name, pattern) for pattern in include)
        and not any(fnmatchcase(name, pattern) for pattern in exclude)
    ]


def kind_of(module: nn.Module) -> str | None:
    """Return which of KINDS a module is, if any; one with an adapter is what it was without."""
    module = base_of(module)
    if isinstance(module, nn.LayerNorm):
        return LAYER_NORM
    if isinstance(module, observed_types()):
        return LINEAR
    # each model of transformers has a class of its own
    return RMS_NORM if type(module).__name__.lower().endswith("rmsnorm") else None


def observed_types() -> tuple[type[nn.Module], ...]:
    """Return the paper's classes; Conv1D is the transposed Linear of GPT-2."""
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
    return {head for head in heads if is_linear(head)}


def is_linear(module: nn.Module) -> bool:
    """Tell whether a module is a Linear, with an adapter or without."""
    return isinstance(base_of(module), nn.Linear)
