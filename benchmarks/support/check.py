"""One model of the support matrix: its gradients under quanttune against eq. 3 in plain PyTorch."""

import random
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn

import quanttune as qt
from benchmarks.support.models import Candidate, candidates
from benchmarks.support.page import NOT_CALLED
from benchmarks.support.reference import ALPHA, Reference, sites_of, tensors_of

# The error of a parameter's gradient is relative to its norm, or to this part of the norm of all:
# the gradient of a bias that a normalization takes away again is rounding alone.
FLOOR = {torch.float64: 1e-6, torch.float32: 1e-3}
# some models of float64 compute parts in float32
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3}
IN_PLACE = "is a view and is being modified inplace"

# what a constructor or a forward raises that was given a size it does not take
MISFIT = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
)

Inputs = dict[str, Tensor]


def examine(library: str, name: str) -> dict[str, Any]:
    """Return what became of one model; any error is part of the answer."""
    row: dict[str, Any] = {}
    try:
        model, inputs = _first_that_runs(library, name, row)
    except _NotRunError as error:
        return {"outcome": "not run", "message": str(error)}
    row |= _inventory(model)
    try:
        qt.attach(model, ALPHA, "constant").detach()
    except ValueError as error:
        return row | {"outcome": "refused", "message": _message(error)}
    found = _compare_or_error(model, inputs)
    if IN_PLACE in found.get("message", ""):
        for module in model.modules():
            if getattr(module, "inplace", False):
                module.inplace = False
        found = {"remedy": "inplace=False"} | _compare_or_error(model, inputs)
    if IN_PLACE in found.get("message", ""):
        exclude = _changed_sites(model, inputs)
        remedy = {"remedy": f"exclude={sorted(set(map(_pattern, exclude)))}"}
        found = remedy | _compare_or_error(model, inputs, exclude)
    return row | found


def _compare_or_error(
    model: nn.Module, inputs: Inputs, exclude: Sequence[str] = ()
) -> dict[str, Any]:
    try:
        return compare(model, inputs, exclude)
    except MISFIT as error:
        if "can't allocate memory" in str(error):  # what torch says of the limit
            raise MemoryError from error
        return {"outcome": "error", "message": _message(error)}


def compare(model: nn.Module, inputs: Inputs, exclude: Sequence[str] = ()) -> dict[str, Any]:
    """Return how far the gradients of two steps with quanttune are from those of plain PyTorch."""
    reference = Reference(model, exclude)
    task, output = _task_loss(model, inputs)
    loss, lost = reference.loss(task, output)
    reference.remove()
    expected = _gradients(model, loss)

    tuner = qt.attach(model, ALPHA, "constant", exclude=exclude)
    worst, where = 0.0, ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # loud outlier terms, tensors that do not reach the loss
        try:
            for _ in range(2):  # the first step compares gradients, the second knows the heads
                total = tuner.combine(_task_loss(model, inputs)[0])
                error, parameter = _error(_gradients(model, total), expected)
                difference = abs(total.item() / loss.item() - 1)
                worst, where = max((worst, where), (error, parameter), (difference, "the loss"))
        finally:
            tuner.detach()
    unobserved = _unobserved(model, reference.seen | set(exclude), set(expected))
    exact = "partly" if unobserved else "exact"
    return {
        "outcome": exact if worst <= TOLERANCE[loss.dtype] else "wrong",
        "error": float(f"{worst:.2g}") if worst < float("inf") else None,
        "parameter": where,
        "terms": len(reference.terms),
        "lost": lost,
        "unobserved": unobserved,
    }


# -------------------------------------------------------------------------------------- the model


class _NotRunError(RuntimeError):
    pass


def _first_that_runs(library: str, name: str, row: dict[str, Any]) -> tuple[nn.Module, Inputs]:
    """Return the first candidate that trains without quanttune, in float64 if it can."""
    message = ""
    for dtype in (torch.float64, torch.float32):
        for candidate in candidates(library, name):
            try:
                model, inputs = _make(candidate, dtype)
                trouble = _trouble(model, inputs)
            except MISFIT as error:
                trouble = _message(error)
            if not trouble:
                row |= {"configuration": candidate.configuration, "dtype": str(dtype)[6:]}
                return model, inputs
            message = message or trouble  # of the smallest
    raise _NotRunError(message)


def _trouble(model: nn.Module, inputs: Inputs) -> str:
    """Return why the gradients of a model cannot be compared, or nothing."""
    first, second = (_task_loss(model, inputs)[0] for _ in range(2))
    if not (first.isfinite() and first == second):
        return f"two forwards give losses of {first:g} and {second:g}"
    finite = all(gradient.isfinite().all() for gradient in _gradients(model, second).values())
    return "" if finite else "a gradient is not finite"


def _make(candidate: Candidate, dtype: torch.dtype) -> tuple[nn.Module, Inputs]:
    _seed()
    model, inputs = candidate.make()
    model.to(dtype).train()
    with torch.no_grad():  # a gain of zero would hide errors behind it
        for p in model.parameters():
            if p.numel() and (p == p.flatten()[0]).all():
                p.add_(torch.randn_like(p), alpha=0.02)
    return model, {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}


def _seed() -> None:
    """Let dropout, dropped paths and masks be the same in every forward."""
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 (transformers masks speech with it)
    random.seed(0)


def _task_loss(model: nn.Module, inputs: Inputs) -> tuple[Tensor, Any]:
    """Return a weighted sum of every output, and the output."""
    _seed()
    output = model(**inputs)
    generator = torch.Generator().manual_seed(1)
    parts = []
    for leaf in tensors_of(output):
        if leaf.requires_grad:
            weights = torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
            parts.append((leaf * weights.to(leaf.dtype)).mean())
    return torch.stack(parts).sum(), output


def _gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _error(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    if different := actual.keys() ^ expected.keys():
        return float("inf"), f"{min(different)}: a gradient on one side only"
    whole = torch.stack([g.norm() for g in expected.values()]).norm()
    errors = []
    for name, gradient in expected.items():
        scale = max(gradient.norm(), FLOOR[whole.dtype] * whole)
        error = ((actual[name] - gradient).norm() / scale).item()
        errors.append((error if error == error else float("inf"), name))
    return max(errors)


def _inventory(model: nn.Module) -> dict[str, Any]:
    """Return how much of the model lies in sites, and what else has weights."""
    sites = set(sites_of(model).values())
    own = {m: list(m.parameters(recurse=False)) for m in model.modules()}
    others = Counter(type(m).__name__ for m, p in own.items() if p and m not in sites)
    inside = sum(p.numel() for m in sites for p in own[m])
    return {
        "parameters": (count := sum(p.numel() for p in model.parameters())),
        "share": round(inside / max(count, 1), 3),
        "sites": len(sites),
        "others": dict(others.most_common()),
    }


def _unobserved(model: nn.Module, seen: set[str], used: set[str]) -> dict[str, dict[str, int]]:
    """Return the sites whose hooks did not fire, by reason; numbers of layers become *."""
    reasons: dict[str, Counter[str]] = {}
    modules = dict(model.named_modules())
    for name in sites_of(model):
        if name in seen:
            continue
        parent = modules[name.rpartition(".")[0]]
        if isinstance(parent, nn.MultiheadAttention):
            reason = "nn.MultiheadAttention takes the weight of its out_proj itself"
        elif any(parameter.startswith(f"{name}.") for parameter in used):
            reason = f"{type(parent).__name__} takes its weight itself"
        else:
            reason = NOT_CALLED
        reasons.setdefault(reason, Counter())[_pattern(name)] += 1
    return {reason: dict(patterns) for reason, patterns in reasons.items()}


def _changed_sites(model: nn.Module, inputs: Inputs) -> list[str]:
    reference = Reference(model)
    _task_loss(model, inputs)
    reference.remove()
    return reference.changed()


def _pattern(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def _message(error: BaseException) -> str:
    first = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first[:200]}"
