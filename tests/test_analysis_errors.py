"""Saturation, precision loss and what a grid does to a distribution, against slow versions."""

import copy
import math
from functools import partial

import numpy as np
import pytest
import torch
from models import vit

from quanttune import fake_quant, quantize
from quanttune.analysis.errors import BINS, ErrorSplit, divergence, histogram, split_error
from quanttune.analysis.probes import sites_of
from quanttune.analysis.survey import survey
from quanttune.analysis.sweep import Trials, site_errors, threshold
from quanttune.fake_quantizer import scale_of
from quanttune.quantization.calibrators import make_calibrator


def grid(absmax: float, bits: int, narrow: bool = False):
    scale = scale_of(torch.tensor(absmax), bits)
    return partial(fake_quant, scale=scale, bits=bits, narrow=narrow)


def heavy_tailed(size: int = 20_000) -> torch.Tensor:
    return torch.distributions.StudentT(2.5).sample((size,))


def slow_split(x: torch.Tensor, absmax: float, bits: int, narrow: bool) -> ErrorSplit:
    """The same, element by element in float64."""
    qmax = 2 ** (bits - 1) - 1
    scale = float(np.float32(absmax) / np.float32(qmax))
    low, high = -(qmax + (not narrow)) * scale, qmax * scale
    sums = [0.0] * 2
    for value in x.tolist():
        clipped = min(max(value, low), high)
        code = min(max(round(value / scale), -qmax - (not narrow)), qmax)
        for i, error in enumerate((value - clipped, clipped - code * scale)):
            sums[i] += error**2
    return ErrorSplit(x.numel(), *sums)


def test_split_of_a_hand_worked_case():
    split = split_error(torch.tensor([0.1, 0.2, -0.4, 0.9, 4.0]), grid(1.0, 3))
    assert split.saturation == pytest.approx(9)
    assert split.precision == pytest.approx(0.042222, abs=1e-6)
    assert split.precision_share == pytest.approx(0.042222 / 9.042222, rel=1e-4)


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("bits", [3, 6, 8])
@pytest.mark.parametrize("absmax", [0.5, 2.0, 1000.0])
def test_split_agrees_with_a_loop_and_adds_up(bits, absmax, narrow):
    x = heavy_tailed(500)
    quantized = grid(absmax, bits, narrow)
    split, slow = split_error(x, quantized), slow_split(x, absmax, bits, narrow)
    # float32 differences of neighbouring numbers: the loop works in float64
    assert list(vars(split).values()) == pytest.approx(list(vars(slow).values()), rel=1e-5)
    error = (x - quantized(x)).double()
    assert split.total == pytest.approx(error.square().sum().item(), rel=1e-6)


def test_no_saturation_over_the_full_range_and_less_precision_over_a_wider_one():
    x = heavy_tailed()
    splits = [split_error(x, grid(x.abs().max().item() * part, 8)) for part in (0.1, 0.5, 1.0, 2.0)]
    assert [split.saturation > 0 for split in splits] == [True, True, False, False]
    assert splits[2].precision_share == 1
    saturation = [split.saturation for split in splits]
    assert saturation == sorted(saturation, reverse=True)
    precision = [split.precision for split in splits]
    assert precision == sorted(precision)


def test_splits_of_batches_add_up():
    x = heavy_tailed(600)
    whole = split_error(x, grid(2.0, 5))
    parts = sum((split_error(part, grid(2.0, 5)) for part in x.split(100)), ErrorSplit())
    assert vars(parts) == pytest.approx(vars(whole), rel=1e-6)
    assert ErrorSplit().precision_share == 1


def slow_divergence(counts: list[float], low: float, high: float, quantized) -> float:
    """TensorRT's expansion with loops: levels, their mass, their bins that are not empty."""
    width, total = (high - low) / len(counts), sum(counts)
    levels: dict[float, list[float]] = {}
    for i, count in enumerate(counts):
        if count:
            center = torch.tensor(low + (i + 0.5) * width, dtype=torch.float32)
            levels.setdefault(quantized(center).item(), []).append(count / total)
    return sum(
        p * math.log(p * len(level) / sum(level)) for level in levels.values() for p in level
    )


def divergence_of(x: torch.Tensor, quantized) -> float:
    low, high = x.min().item(), x.max().item()
    return divergence(histogram(x, low, high), low, high, quantized)


@pytest.mark.parametrize("part", [1.0, 0.2])
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_divergence_agrees_with_a_loop(bits, part):
    x = heavy_tailed()
    quantized = grid(x.abs().max().item() * part, bits)
    low, high = x.min().item(), x.max().item()
    counts = histogram(x, low, high)
    expected = slow_divergence(counts.tolist(), low, high, quantized)
    assert divergence(counts, low, high, quantized) == pytest.approx(expected, rel=1e-9)
    edges = np.histogram(x.numpy(), BINS, (low, high))[0]
    # a value on an edge may count on either side of it
    assert np.abs(counts.numpy() - edges).sum() <= 4


def test_fewer_bits_lose_more_and_a_level_per_bin_loses_nothing():
    x = heavy_tailed()
    losses = [divergence_of(x, grid(x.abs().max().item(), bits)) for bits in (6, 7, 8, 16)]
    assert losses == sorted(losses, reverse=True)
    assert losses[2] > 0.01
    assert losses[3] == pytest.approx(0, abs=1e-12)


def test_divergence_does_not_depend_on_the_scale():
    x = heavy_tailed()
    once, again = (divergence_of(f * x, grid(f * x.abs().max().item(), 6)) for f in (1.0, 8.0))
    assert once == again


def test_constants_lose_nothing():
    x = torch.full((100,), 3.0)
    assert histogram(x, 3.0, 3.0).sum() == 100
    assert divergence_of(x, grid(3.0, 8)) == 0


@pytest.mark.parametrize(
    ("percent", "expected"),
    [
        (100.0, 8.0),
        (99.9, 5.994),
        # numpy.percentile of 0..4 and of 0, 2, .. 8, and their mean
        (50.0, 3.0),
    ],
)
def test_thresholds_leave_that_part_untouched(percent, expected):
    calibrator = make_calibrator(threshold(percent), 8)
    for factor in (1.0, 2.0):
        calibrator.update(factor * torch.arange(5.0))
    assert calibrator.absmax().item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0,), "a threshold must be above 0 and at most 100 per cent, got 0"),
        ((101.0,), "a threshold must be above 0 and at most 100 per cent, got 101"),
    ],
)
def test_bad_thresholds_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        threshold(*arguments)


def test_site_errors_are_those_of_the_float_tensors():
    example = vit(2)
    model, batches = example.model.eval(), [example.inputs[:2], example.inputs[2:]]
    seen: list[torch.Tensor] = []
    hook = model.blocks[1].mlp.fc1.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    hook.remove()
    tried = Trials(model, batches, lambda m: 0.5, bits=6)
    trials = [tried[threshold(percent)] for percent in (90.0, 100.0)]
    assert tried["minmax"] is trials[1]
    quantized = quantize(copy.deepcopy(model), 8, data=batches)
    errors = site_errors(quantized, batches, survey(quantized, batches), trials)
    # the LayerNorm's output and the input of fc1 are one tensor, under the first name
    found = errors["blocks.1.norm2.output"]
    x, site = torch.cat(seen), "blocks.1.norm2.output"
    for trial, split, loss in zip(trials, found.split, found.divergence, strict=True):
        expected = split_error(x, trial.grids[site])
        assert vars(split) == pytest.approx(vars(expected), rel=1e-4)
        assert loss == pytest.approx(divergence_of(x, trial.grids[site]), rel=1e-6)
        assert trial.value == 0.5
    assert found.split[1].saturation == 0 < found.split[0].saturation
    assert "blocks.1.mlp.fc1.input" not in errors
    assert all("forward" not in vars(quantizer) for quantizer in sites_of(quantized).values())
