"""A small ViT on scikit-learn's digits, whose outliers are trained in: synthetic, but quick and
removable.
"""

import copy
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..refitting.refit import refit
from .experiment import COVERAGE, Arm
from .training import train

TEST, VALIDATION, BATCH = 797, 150, 32
PRETRAIN, PRETRAIN_STEPS = Arm("pretrain", "", 1e-3), 465
# at half as many steps the control mends most of the damage itself: docs/results.md
INFLATE, INFLATE_STEPS = Arm("inflate", "", 2e-3), 620
INFLATION = 0.5  # weight of the loss that grows outliers
DECAY = 0.05


class Digits:
    """Classification of 8x8 digits; the metric is the accuracy in per cent."""

    name = "digits"
    metric = "accuracy"
    bits = (8, 7, 6, 5)
    ways = MappingProxyType(dict.fromkeys(("minmax", "percentile"), ("channel", "tensor")))
    coverages = (COVERAGE,)
    steps = 186
    caveats = (
        "Synthetic: the outliers are trained in, and their size is our choice.",
        "797 test images: one standard error is about 0.7 points.",
    )
    arms = (
        Arm("base", "the model with outliers"),
        Arm("control", "alpha = 0, same budget", 2e-3),
        Arm("qat8", "8-bit fake quantization in the loop", 2e-3, qat_bits=8),
        Arm("qat6", "6-bit fake quantization in the loop", 2e-3, qat_bits=6),
        Arm("paper", "QuantTune as published", 2e-3, alpha=0.3),
        Arm("detached", "its deviation held constant", 2e-3, alpha=0.3, detach_deviation=True),
    )

    def __init__(self, seed: int, model: str | None = None, test_rows: int | None = None) -> None:
        if model:
            raise ValueError("the digits demo makes its own model: --model is for others")
        if test_rows is not None:
            raise ValueError(f"the digits demo measures on {TEST} rows: --test-rows is for others")
        self._seed = seed
        images, labels = _load(seed)
        sizes = [len(images) - TEST - VALIDATION, VALIDATION, TEST]
        names = ("tuning", "validation", "test")
        self.images = dict(zip(names, images.split(sizes), strict=True))
        self.labels = dict(zip(names, labels.split(sizes), strict=True))
        self._base = self._train_base()

    def prepare(self, arm: Arm, on_step: Callable[[], None]) -> nn.Module:
        model = copy.deepcopy(self._base)
        if arm.refit:
            refit(model, list(self.images["tuning"].split(BATCH)), tolerance=arm.refit)
        if not arm.learning_rate:
            return model
        return self._train(model, arm, self.steps, self._seed + 100, on_step=on_step)

    def calibration(self) -> list[Any]:
        return list(self.images["tuning"][:500].split(50))

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: str = "test") -> float:
        logits = model.eval()(self.images[split])
        return 100 * (logits.argmax(1) == self.labels[split]).float().mean().item()

    def _train_base(self) -> nn.Module:
        torch.manual_seed(self._seed)
        model = _vit()
        self._train(model, PRETRAIN, PRETRAIN_STEPS, self._seed)
        grown = _OutlierGrowth(model)
        self._train(model, INFLATE, INFLATE_STEPS, self._seed + 50, grown)
        grown.remove()
        return model

    def _train(
        self,
        model: nn.Module,
        arm: Arm,
        steps: int,
        seed: int,
        growth: "_OutlierGrowth | None" = None,
        on_step: Callable[[], None] = lambda: None,
    ) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        images, labels = self.images["tuning"], self.labels["tuning"]
        per_epoch = len(images) // BATCH
        epochs = -(-steps // per_epoch)
        order = [torch.randperm(len(images), generator=generator) for _ in range(epochs)]
        batches = [batch for epoch in order for batch in epoch.split(BATCH)[:per_epoch]]

        def loss(model: nn.Module, step: int) -> Tensor:
            batch = batches[step]
            task = F.cross_entropy(model(images[batch]), labels[batch])
            return task if growth is None else (1 - INFLATION) * task - INFLATION * growth.take()

        return train(model, arm, steps, loss, weight_decay=DECAY, on_step=on_step)


class _OutlierGrowth:
    """Mean log(max|A| / mean|A|) of the outputs of attention and MLP: to be maximised."""

    def __init__(self, model: nn.Module) -> None:
        self._values: list[Tensor] = []
        self._handles = [
            module.register_forward_hook(self._hook)
            for name, module in model.named_modules()
            if name.endswith(("mlp.fc2", "attn.proj"))
        ]

    def take(self) -> Tensor:
        value = torch.stack(self._values).mean()
        self._values = []
        return value

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, module: nn.Module, args: Any, output: Tensor) -> None:
        magnitude = output.flatten(1).abs()
        self._values.append((magnitude.amax(1) / magnitude.mean(1)).log().mean())


def _load(seed: int) -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1234 + seed))
    return images[order], labels[order]


def _vit() -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(
        img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=64, depth=4, num_heads=4,
        class_token=False, global_pool="avg",
    )  # fmt: skip
    for module in model.modules():
        # timm's small initial weights need far more than 15 epochs
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
    nn.init.normal_(model.pos_embed, std=0.2)
    return model
