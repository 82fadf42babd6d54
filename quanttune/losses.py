"""What an observed tensor may cost, sample by sample: the paper's ratio, and other outlier losses.

`attach(model, loss=...)` takes a name from LOSSES or an object of a class below. A new loss is a
class with three methods: `measure` its statistics, whose first column is max|A|, tell its `values`
from them, and add its gradient to the one that arrives (`backward`).
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from .reference import RATIO, result_dtype


class OutlierLoss(Protocol):
    """A loss of each sample of an observed tensor. A is the sample, flattened; N its size."""

    def measure(
        self, kernels: Any, x: Tensor, samples: int, ranges: Tensor | None = None
    ) -> Tensor:
        """Return what is kept of x, of shape (samples, columns).

        ranges: which elements of each sample are no padding; see `reference.outlier_statistics`.
        """

    def values(self, statistics: Tensor) -> Tensor:
        """Return the loss of each sample, of shape (..., samples) for (..., samples, columns)."""

    def backward(
        self,
        kernels: Any,
        grad: Tensor,
        x: Tensor,
        statistics: Tensor,
        ratio_grad: Tensor,
        ranges: Tensor | None = None,
    ) -> Tensor:
        """Return grad + the gradient of sum(ratio_grad * values) with respect to x."""


@dataclass(frozen=True)
class Ratio:
    """r = (max|A| - median|A|) / std(A), eq. 2 of the paper (QuantTune, arXiv 2403.06497).

    exact, detach_deviation: as in `attach`.
    """

    exact: bool = field(default=False, kw_only=True, repr=False)
    detach_deviation: bool = field(default=False, kw_only=True, repr=False)

    def measure(
        self, kernels: Any, x: Tensor, samples: int, ranges: Tensor | None = None
    ) -> Tensor:
        return kernels.outlier_statistics(x, samples, self.exact, ranges)

    def values(self, statistics: Tensor) -> Tensor:
        return statistics[..., RATIO]

    def weigh(self, ratio_grad: Tensor, statistics: Tensor) -> Tensor:
        """Return the gradient with respect to the ratio: ratio_grad * d(value)/dr."""
        return ratio_grad

    def backward(
        self,
        kernels: Any,
        grad: Tensor,
        x: Tensor,
        statistics: Tensor,
        ratio_grad: Tensor,
        ranges: Tensor | None = None,
    ) -> Tensor:
        weight = self.weigh(ratio_grad, statistics)
        return kernels.outlier_statistics_backward(
            grad, x, statistics, weight, self.exact, self.detach_deviation, ranges
        )


@dataclass(frozen=True)
class HingeRatio(Ratio):
    """max(r - margin, 0): tensors that are mild enough are left alone."""

    margin: float = 8.0

    def values(self, statistics: Tensor) -> Tensor:
        return (statistics[..., RATIO] - self.margin).clamp(min=0)

    def weigh(self, ratio_grad: Tensor, statistics: Tensor) -> Tensor:
        return ratio_grad * (statistics[:, RATIO] > self.margin)


@dataclass(frozen=True)
class LogRatio(Ratio):
    """log(1 + r): every tensor's ratio counts relative to itself."""

    def values(self, statistics: Tensor) -> Tensor:
        return statistics[..., RATIO].log1p()

    def weigh(self, ratio_grad: Tensor, statistics: Tensor) -> Tensor:
        return ratio_grad / (1 + statistics[:, RATIO])


@dataclass(frozen=True)
class _Rows:
    """The samples of a tensor as rows, with zeros for padding."""

    values: Tensor
    inside: Tensor | None
    size: Tensor  # (samples, 1)

    @classmethod
    def of(cls, x: Tensor, samples: int, ranges: Tensor | None) -> "_Rows":
        values = x.detach().reshape(samples, -1).to(result_dtype(x))
        length = values.shape[1]
        if ranges is None:
            return cls(values, None, values.new_full((samples, 1), length))
        begin, size = ranges[:, :1], ranges[:, 1:]
        at = torch.arange(length, device=x.device)
        inside = (at >= begin) & (at < begin + size)
        size = size.clamp(min=1).to(values.dtype)
        return cls(torch.where(inside, values, 0), inside, size)

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean of values that are 0 in padding, of shape (samples, 1)."""
        return values.sum(1, keepdim=True) / self.size

    def normalized(self, mean: Tensor, deviation: Tensor) -> Tensor:
        """Return (A - mean) / deviation; 0 in padding and where the deviation is 0."""
        normal = (self.values - mean) / torch.where(deviation == 0, 1, deviation)
        return normal if self.inside is None else torch.where(self.inside, normal, 0)


class _InPyTorch:
    """A loss that no kernel computes: several passes over x, forward and backward."""

    def measure(
        self, kernels: Any, x: Tensor, samples: int, ranges: Tensor | None = None
    ) -> Tensor:
        rows = _Rows.of(x, samples, ranges)
        return torch.cat([rows.values.abs().amax(1, keepdim=True), *self._moments(rows)], 1)

    def backward(
        self,
        kernels: Any,
        grad: Tensor,
        x: Tensor,
        statistics: Tensor,
        ratio_grad: Tensor,
        ranges: Tensor | None = None,
    ) -> Tensor:
        rows = _Rows.of(x, len(statistics), ranges)
        slope = self._gradient(rows, statistics[:, 1:, None].unbind(1)) / rows.size
        added = (ratio_grad[:, None] * slope).reshape(x.shape)
        return (grad.to(added.dtype) + added).to(grad.dtype)

    def _moments(self, rows: _Rows) -> tuple[Tensor, ...]:
        """Return what the loss and its gradient need of each row, each of shape (samples, 1)."""
        raise NotImplementedError

    def _gradient(self, rows: _Rows, moments: tuple[Tensor, ...]) -> Tensor:
        """Return N d(value)/dx of each row, 0 in padding."""
        raise NotImplementedError


@dataclass(frozen=True)
class Kurtosis(_InPyTorch):
    """(k - target)^2 for the kurtosis k = mean(((A - mean) / std)^4), std with N.

    Source: KURE (arXiv 2002.07686), there of weights; its target 1.8 is the kurtosis of a uniform
    distribution. A constant sample costs nothing.
    """

    target: float = 1.8

    def values(self, statistics: Tensor) -> Tensor:
        return (statistics[..., 4] - self.target).square()

    def _moments(self, rows: _Rows) -> tuple[Tensor, ...]:
        mean = rows.mean(rows.values)
        deviation = rows.mean(rows.normalized(mean, torch.ones_like(mean)).square()).sqrt()
        normal = rows.normalized(mean, deviation)
        kurtosis = torch.where(deviation == 0, self.target, rows.mean(normal.pow(4)))
        return mean, deviation, rows.mean(normal.pow(3)), kurtosis

    def _gradient(self, rows: _Rows, moments: tuple[Tensor, ...]) -> Tensor:
        mean, deviation, skewness, kurtosis = moments
        normal = rows.normalized(mean, deviation)
        slope = 8 * (kurtosis - self.target) / torch.where(deviation == 0, 1, deviation)
        added = slope * (normal.pow(3) - skewness - kurtosis * normal)
        return added if rows.inside is None else torch.where(rows.inside, added, 0)


@dataclass(frozen=True)
class Tweo(_InPyTorch):
    """mean((|A| / threshold)^power): what is far above the threshold costs most.

    It knows absolute sizes only, so a tensor of small range costs little however it is shaped.
    Source: TWEO (arXiv 2511.23225), there of the outputs of blocks.
    """

    threshold: float = 3.0
    power: float = 4.0

    def values(self, statistics: Tensor) -> Tensor:
        return statistics[..., 1]

    def _moments(self, rows: _Rows) -> tuple[Tensor, ...]:
        return (rows.mean((rows.values / self.threshold).abs().pow(self.power)),)

    def _gradient(self, rows: _Rows, moments: tuple[Tensor, ...]) -> Tensor:
        scaled = rows.values / self.threshold
        return self.power / self.threshold * scaled.sign() * scaled.abs().pow(self.power - 1)


LOSSES: dict[str, Callable[[], OutlierLoss]] = {
    "ratio": Ratio,
    "hinge_ratio": HingeRatio,
    "log_ratio": LogRatio,
    "kurtosis": Kurtosis,
    "tweo": Tweo,
}


def find_loss(loss: "str | OutlierLoss", exact: bool, detach_deviation: bool) -> OutlierLoss:
    """Return the loss of a name, or the one that is given, with the options of `attach`."""
    if isinstance(loss, str):
        if loss not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {loss!r}")
        loss = LOSSES[loss]()
    options = {"exact": exact, "detach_deviation": detach_deviation}
    if isinstance(loss, Ratio):
        exact, detach_deviation = exact or loss.exact, detach_deviation or loss.detach_deviation
        return replace(loss, exact=exact, detach_deviation=detach_deviation)
    for option, wanted in options.items():
        if wanted:
            raise ValueError(f"{option}=True is for losses of the ratio, not for {loss}")
    return loss
