"""The training loop that the recipes share."""

import copy
import math
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from ..quantization.simulation import quantize
from ..tuning.attach import attach

if TYPE_CHECKING:
    from .experiment import Arm

WARMUP = 10  # steps


def train(
    model: nn.Module,
    arm: "Arm",
    steps: int,
    task_loss: Callable[[nn.Module, int], Tensor],
    *,
    weight_decay: float = 0.0,
    on_step: Callable[[], None] = lambda: None,
) -> nn.Module:
    """Tune a model as an arm says, in place, and return it as a float model in evaluation mode.

    AdamW, linear warm-up, cosine learning rate, gradients clipped to norm 1. With `qat_bits` the
    forward runs on dynamic grids of that width, and what comes back are the float weights
    underneath.
    """
    trained = model
    if arm.qat_bits:
        trained = quantize(copy.deepcopy(model), arm.qat_bits, calibrator="dynamic")
    tuner = None
    if arm.alpha or arm.finish_steps:
        tuner = attach(
            model,
            arm.alpha,
            total_steps=steps,
            loss=arm.loss,
            detach_deviation=arm.detach_deviation,
            observe_every=arm.observe_every,
            finish_steps=arm.finish_steps,
            finish_bits=arm.finish_bits,
        )
    groups = _groups(trained, weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=arm.learning_rate, fused=True)
    scheduler = LambdaLR(optimizer, lambda step: _warm_cosine(step, steps))
    trained.train()
    for step in range(steps):
        loss = task_loss(trained, step)
        if tuner:
            with warnings.catch_warnings():
                # the recipes start from a fitted task, whose gradient is near zero: no comparison
                warnings.filterwarnings("ignore", message="the outlier term's gradient norm")
                loss = tuner.combine(loss)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if tuner:
            tuner.step()
        on_step()
    if tuner:
        tuner.detach()
    if trained is not model:
        weights = trained.state_dict()
        model.load_state_dict({name: weights[name] for name in model.state_dict()})
    return model.eval()


def distance_from(teacher: nn.Module, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the Kullback-Leibler divergence of a model's next tokens from those of its teacher."""
    with torch.no_grad():
        target = teacher(**batch).logits.log_softmax(-1)
    answer = model(**batch).logits.log_softmax(-1)
    return F.kl_div(answer, target, reduction="none", log_target=True).sum(-1).mean()


def _groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Decay matrices, and neither biases nor norms."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trainable if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.dim() <= 1], "weight_decay": 0.0},
    ]


def _warm_cosine(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / WARMUP) * (1 + math.cos(math.pi * min(step / steps, 1.0))) / 2
