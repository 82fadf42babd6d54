"""What tuning is for: outliers shrink, the task is kept, and plain min-max quantization works."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import quanttune as qt

STEPS, BITS = 200, 6


TOKENS, CHANNELS, CLASSES = 24, 16, 4


class Network(nn.Module):
    """A residual block in which the first token has one huge channel that the next layer ignores.

    The massive activations of language models are like this.
    """

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(CHANNELS, 32), nn.Linear(32, CHANNELS)
        self.norm, self.head = nn.LayerNorm(CHANNELS), nn.Linear(CHANNELS, CLASSES)
        with torch.no_grad():
            self.up.weight[5, 0] = 10.0  # others are at most 0.25
            self.down.weight[:, 5] /= 50

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x + self.down(F.relu(self.up(x)))).mean(1))


def tuned(model: nn.Module, x: Tensor, labels: Tensor, alpha: float) -> nn.Module:
    model = copy.deepcopy(model)
    tuner = qt.attach(model, alpha, total_steps=STEPS, detach_deviation=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for _ in range(STEPS):
        loss = tuner.combine(F.cross_entropy(model(x), labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        tuner.step()
    tuner.detach()
    return model.eval()


@torch.no_grad()
def measured(model: nn.Module, x: Tensor, labels: Tensor) -> tuple[float, float, float]:
    """Return the task's loss, the outlier ratio of the wide tensor, and the quantized error."""
    exact = model(x)
    ratio = qt.fused_observer.outlier_ratio(model.up(x)).mean().item()
    quantized = qt.quantize(copy.deepcopy(model), BITS, weights="tensor", data=[x])
    error = (quantized(x) - exact).norm() / exact.norm()
    return F.cross_entropy(exact, labels).item(), ratio, error.item()


@pytest.mark.filterwarnings("ignore:the outlier term's gradient norm")
def test_tuning_removes_an_outlier_that_training_leaves():
    """With alpha the ratio and the error of W6A6 fall; without, at the same budget, they do not."""
    x = torch.randn(256, TOKENS, CHANNELS)
    x[..., 0] = F.one_hot(torch.tensor(0), TOKENS)  # what marks the first token
    labels = (x.mean(1) @ torch.randn(CHANNELS, CLASSES)).argmax(1)
    base = Network()
    _, ratio, _ = measured(base, x, labels)
    loss, left, error = measured(tuned(base, x, labels, 0.0), x, labels)
    tuned_loss, tuned_ratio, tuned_error = measured(tuned(base, x, labels, 0.3), x, labels)
    assert left > 0.7 * ratio
    assert tuned_ratio < 0.5 * left
    assert tuned_error < 0.6 * error
    assert tuned_loss < (loss + math.log(CLASSES)) / 2  # nearer to the control than to guessing
