"""Attach outlier-driven tuning to a model."""

from collections.abc import Sequence

import torch
from torch import nn

from ..losses import OutlierLoss, find_loss
from ..masks import Mask
from ..transaction import transaction
from . import schedule
from .adapters import has_adapters
from .finishing import BITS, Finishing, check_finish
from .hooks import is_attached, refuse_compiled_parts
from .observers import Observers
from .sites import PAPER, find_heads, find_sites, find_unobserved
from .tuner import Tuner

BALANCES = ("none", "initial")


def attach(
    model: nn.Module,
    alpha: float = 0.5,
    decay: str = "linear",
    total_steps: int | None = None,
    *,
    balance: str = "none",
    loss: str | OutlierLoss = "ratio",
    detach_deviation: bool = False,
    exact: bool = False,
    observe_every: int = 1,
    mask: Mask | None = "attention_mask",
    sites: Sequence[str] = PAPER,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    finish_steps: int = 0,
    finish_bits: Sequence[int] = BITS,
) -> Tuner:
    """Observe the inputs and outputs of every Linear and LayerNorm of a model while it trains.

    Only hooks are added: no module is replaced and nothing enters the state_dict. The model is
    observed when it is called in training mode with gradients enabled; a copy of it is not
    attached. Samples are counted along the first dimension of its first input; all forwards between
    two `combine` count. PyTorch refuses modules that
    change an observed output in place, such as ReLU(inplace=True) after a Linear.

    torch.compile: run one forward of the attached model in training mode before the first compiled
    one. What was compiled already is compiled again, since torch.compile takes no notice of new
    hooks.

    Adapters of PEFT: a module that has one is observed as the merged one will be, its input and its
    output, under the name of the model without adapters; what is inside an adapter is not.

    Args:
        model: any module that contains Linear, Conv1D (GPT-2) or LayerNorm, or what `sites` says.
        alpha: weight of the outlier loss, 0 to 1 (0.3, 0.5 and 0.7 in the paper). With 0
            training is bit for bit what it is without quanttune.
        decay: how alpha falls to 0 over `total_steps` optimizer steps: "linear", "cosine", or
            "constant" for not at all.
        balance: "none", as in the paper, or "initial": L_out counts relative to its first value,
            times the first task loss. Use it where the two losses are far apart.
        loss: what a tensor costs: "ratio" (eq. 2), another name of `quanttune.losses.LOSSES`, or an
            object of a class there. The last two of them take several passes over each tensor.
        detach_deviation: hold the deviation constant in the gradient of the ratio. It lowers large
            outliers faster than the paper's form, which stays the default.
        exact: take medians over all elements, not over a sample, of tensors with more than 65,536
            elements per sample.
        observe_every: observe at every k-th optimizer step only, and count L_out k times there.
        mask: which tokens are padding, and stay out of the statistics: the name of an argument of
            the model's forward, (samples, tokens) with 0 for padding, or a function that gets all
            arguments by name and returns such a tensor. It holds for what is computed of
            the arguments of its shape: with the default, that of a decoder is
            `decoder_attention_mask`, and submodules that are called with a mask use theirs. Of
            observed tensors it holds for (samples, tokens, ...) and (samples * tokens, channels).
            None: padding counts.
        sites: the kinds of modules to observe: "linear" (Conv1D too), "layer_norm", "rms_norm".
        include, exclude: patterns (fnmatch) of the qualified names of the modules to observe. The
            logits are left out in any case.
        finish_steps: how many of `total_steps`, at the end, train a model that rounds all that
            `quantize` would, instead of the outlier loss. Until `detach` it does so in training
            mode; in evaluation mode it is the float model. Not with torch.compile.
        finish_bits: the widths that it rounds to, which take turns from step to step.

    Raises:
        ValueError: an argument is out of range, nothing matches, the model is attached already, or
            parts of it are compiled each by itself.

    Source: QuantTune, arXiv 2403.06497, eqs. 2 and 3; `balance` and `detach_deviation` are ours.
    """
    model = _unwrap(model)
    schedule.check(alpha, decay, total_steps)
    if balance not in BALANCES:
        raise ValueError(f"balance must be one of {', '.join(BALANCES)}, got {balance!r}")
    if is_attached(model):
        raise ValueError(f"{type(model).__name__} is attached already: detach() its tuner first")
    if observe_every < 1:
        raise ValueError(f"observe_every must be at least 1, got {observe_every}")
    check_finish(finish_bits, finish_steps, total_steps)
    refuse_compiled_parts(model)
    if finish_steps and has_adapters(model):
        raise ValueError(
            "finish_steps rounds weights, and those of adapters are known once they are merged: "
            "tune with finish_steps=0, then merge_and_unload() and finish the model that it returns"
        )
    finish = Finishing(model, finish_bits, finish_steps) if finish_steps else None
    if finish:
        finish.begin()  # refuses what it must before a step is trained
        finish.end()
    with transaction(model):
        observers = Observers(
            model,
            find_sites(model, include, exclude, sites),
            find_heads(model),
            find_loss(loss, exact, detach_deviation),
            mask,
            find_unobserved(model, include, exclude, sites),
        )
        return Tuner(model, observers, alpha, decay, total_steps, balance, observe_every, finish)


def _unwrap(model: nn.Module) -> nn.Module:
    """Return the model in what torch.compile or DistributedDataParallel returned."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module  # the wrapper hands out copies of the logits, unknown to the tuner
        elif isinstance(model, torch._dynamo.OptimizedModule):
            model = model._orig_mod
        else:
            return model
