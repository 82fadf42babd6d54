"""Calibrators against numpy, hand-worked values and properties."""

import numpy as np
import pytest
import torch

from quanttune.quantization.calibrators import CALIBRATORS, MinMax, Percentile


def absmax_of(calibrator, *batches):
    for batch in batches:
        calibrator.update(batch)
    return calibrator.absmax()


def test_percentile_of_a_ramp():
    assert absmax_of(Percentile(99.9), torch.arange(1001.0)) == 999  # methods: 0..1000 -> 999


@pytest.mark.parametrize("percent", [50, 99, 99.9, 99.999, 100])
@pytest.mark.parametrize("size", [1, 2, 999, 12345])
def test_percentile_agrees_with_numpy(percent, size):
    x = torch.randn(size, dtype=torch.float32)
    expected = np.percentile(np.abs(x.numpy().astype(np.float64)), percent)
    assert absmax_of(Percentile(percent), x).item() == pytest.approx(expected, rel=1e-6)


def test_percentile_is_the_mean_over_batches():
    batches = [torch.randn(500) * factor for factor in (1, 3)]
    expected = np.mean([np.percentile(np.abs(batch.numpy()), 99.9) for batch in batches])
    assert absmax_of(Percentile(99.9), *batches).item() == pytest.approx(expected, rel=1e-6)


def test_percentile_takes_more_elements_than_torch_quantile():
    x = torch.zeros(2**24 + 1)
    x[0] = -7.0
    assert absmax_of(Percentile(100), x) == 7


def test_minmax_is_the_running_maximum_of_magnitudes():
    assert absmax_of(MinMax(), torch.tensor([1.0, -4.0]), torch.tensor([3.0])) == 4


@pytest.mark.parametrize("name", CALIBRATORS)
def test_every_calibrator_scales_with_its_data(name):
    x = torch.randn(4, 300)
    once = absmax_of(CALIBRATORS[name](), x)
    assert absmax_of(CALIBRATORS[name](), 4 * x) == 4 * once
    assert once <= x.abs().max()


@pytest.mark.parametrize("name", CALIBRATORS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_float32_ranges(name, dtype):
    x = torch.randn(4, 300).to(dtype)
    result = absmax_of(CALIBRATORS[name](), x)
    assert result.dtype == torch.float32
    assert result == absmax_of(CALIBRATORS[name](), x.float())


@pytest.mark.parametrize("percent", [0, -1, 101])
def test_percent_out_of_range(percent):
    with pytest.raises(ValueError, match=f"percent must be above 0 and at most 100, got {percent}"):
        Percentile(percent)
