"""Calibrators against numpy, slow versions of their rules, hand-worked values and properties."""

import math

import numpy as np
import pytest
import torch

from quanttune.fake_quantizer import integer_range
from quanttune.quantization.calibrators import (
    CALIBRATORS,
    AffineOMSE,
    Entropy,
    MeanSquaredError,
    MinMax,
    MovingAverage,
    Percentile,
    SymmetricOMSE,
    entropy,
    make_calibrator,
)
from quanttune.quantization.calibrators.search import affine_qparams
from quanttune.quantization.simulation import quantize, quantizers

ALL = {**CALIBRATORS, "omse_affine": AffineOMSE}
SEARCHING = ["mse", "omse", "kl"]
each = pytest.mark.parametrize("name", ALL)


def updated(calibrator, *batches):
    for batch in batches:
        calibrator.update(batch)
    return calibrator


def absmax_of(calibrator, *batches):
    return updated(calibrator, *batches).absmax()


def heavy_tailed(*shape):
    return torch.distributions.StudentT(2.5).sample(shape)


DATA = {
    "normal": lambda: torch.randn(4000),
    "heavy tailed": lambda: heavy_tailed(4000),
    "an outlier": lambda: torch.cat([torch.randn(3999), torch.tensor([90.0])]),
    "one-sided": lambda: torch.randn(4000).relu(),
    "shifted": lambda: torch.randn(4000) + 3,
    "constant": lambda: torch.full((4000,), -1.7),
}


@pytest.fixture(params=DATA)
def data(request):
    return DATA[request.param]()


def split(x, *sizes):
    """Return x in batches, the largest magnitude in the first."""
    order = x.abs().argmax()
    x = torch.cat([x[order : order + 1], x[:order], x[order + 1 :]])
    return x.split([*sizes, len(x) - sum(sizes)])


# ------------------------------------------------------------------------------ lowest and highest


def test_minmax_is_the_running_maximum_of_magnitudes():
    minmax = updated(MinMax(), torch.tensor([1.0, -4.0]), torch.tensor([3.0]))
    assert minmax.absmax() == 4
    assert minmax.range() == (-4, 3)


@pytest.mark.parametrize(("sigma", "expected"), [(0.01, 1.0299), (0.1, 1.29)])
def test_the_moving_average_of_1_2_3(sigma, expected):
    batches = [torch.tensor([0.0, value]) for value in (1.0, 2.0, 3.0)]
    average = updated(MovingAverage(sigma), *batches)
    assert average.absmax().item() == pytest.approx(expected, rel=1e-6)
    assert average.range().low == 0
    negative = absmax_of(MovingAverage(sigma), *(-batch for batch in batches))
    assert negative == average.absmax()


def test_the_moving_average_counts_the_first_of_ten_batches_as_91_percent():
    batches = [torch.ones(1), *(torch.zeros(1) for _ in range(9))]
    assert absmax_of(MovingAverage(), *batches).item() == pytest.approx(0.99**9, rel=1e-6)


@pytest.mark.parametrize("sigma", [0, -0.1, 1.5])
def test_sigma_out_of_range(sigma):
    with pytest.raises(ValueError, match=f"sigma must be above 0 and at most 1, got {sigma}"):
        MovingAverage(sigma)


# ------------------------------------------------------------------------------------- percentiles


def test_percentile_of_a_ramp():
    ramp = torch.arange(1001.0)
    assert absmax_of(Percentile(99.9), ramp) == 999  # methods: 0..1000 -> 999
    both = updated(Percentile(99.9, two_sided=True), ramp - 500)
    assert both.range() == (-499, 499)


@pytest.mark.parametrize("percent", [50, 99, 99.9, 99.999, 100])
@pytest.mark.parametrize("size", [1, 2, 999, 12345])
def test_percentile_agrees_with_numpy(percent, size):
    x = heavy_tailed(size)
    wide = x.numpy().astype(np.float64)
    expected = np.percentile(np.abs(wide), percent)
    assert absmax_of(Percentile(percent), x).item() == pytest.approx(expected, rel=1e-6)
    both = np.percentile(wide, [100 - percent, percent])
    actual = updated(Percentile(percent, two_sided=True), x.view(-1, 1)).range()
    np.testing.assert_allclose([bound.item() for bound in actual], both, rtol=2e-6, atol=1e-7)


def test_percentile_with_ties_in_many_groups():
    x = (torch.randn(20000) * 2).round()
    for percent in (99, 99.9):
        expected = np.percentile(np.abs(x.numpy()), percent)
        assert absmax_of(Percentile(percent), x) == expected


def test_percentile_is_the_mean_over_batches():
    batches = [torch.randn(500) * factor for factor in (1, 3, 2)]
    expected = np.mean([np.percentile(np.abs(batch.numpy()), 99.9) for batch in batches])
    assert absmax_of(Percentile(99.9), *batches).item() == pytest.approx(expected, rel=1e-6)


def test_percentile_as_a_moving_average_of_both_sides():
    batches = [heavy_tailed(700) + shift for shift in (0, 3, 1)]
    bounds = [np.percentile(batch.numpy().astype(np.float64), [1, 99]) for batch in batches]
    expected = bounds[0]
    for bound in bounds[1:]:
        expected = expected + 0.01 * (bound - expected)
    actual = updated(Percentile(99, two_sided=True, sigma=0.01), *batches).range()
    np.testing.assert_allclose([bound.item() for bound in actual], expected, rtol=1e-5)


def test_percentile_takes_more_elements_than_torch_quantile():
    x = torch.zeros(2**24 + 1)
    x[0] = -7.0
    assert absmax_of(Percentile(100), x) == 7


@pytest.mark.parametrize("percent", [0, -1, 101])
def test_percent_out_of_range(percent):
    with pytest.raises(ValueError, match=f"percent must be above 0 and at most 100, got {percent}"):
        Percentile(percent)


# ------------------------------------------------------------------------------- the least loss


def slow_loss(x, step, qmin, qmax):
    """The squared error of the grid of a step, in numpy: codes in float32, the rest in float64."""
    x, step = x.numpy().astype(np.float32), np.float32(step)
    code = np.clip(np.rint(x / step), qmin, qmax).astype(np.float64)
    return np.square(x.astype(np.float64) - code * np.float64(step)).sum()


def slow_best(x, candidates, bits):
    """Return the candidate of the least loss, the first of equal ones."""
    qmin, qmax = integer_range(bits)
    losses = [slow_loss(x, np.float32(top) / np.float32(qmax), qmin, qmax) for top in candidates]
    return candidates[int(np.argmin(losses))]


def shrinking(absmax):
    return [np.float32(absmax) * np.float32(1 - 0.01 * i) for i in range(90)]


def test_omse_of_a_thousand_ones_and_a_ten():
    x = torch.cat([torch.ones(1000), torch.tensor([10.0])])
    assert slow_loss(x, 10.0, -2, 1) == 1000
    best = absmax_of(SymmetricOMSE(2), x)
    assert best.item() == pytest.approx(1.1, rel=1e-6)
    assert slow_loss(x, best.item(), -2, 1) == pytest.approx(89.21, rel=1e-6)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_omse_agrees_with_a_slow_search(data, bits):
    assert absmax_of(SymmetricOMSE(bits), data) == slow_best(
        data, shrinking(data.abs().max()), bits
    )


def test_omse_takes_the_range_of_all_batches_and_the_loss_of_the_last(data):
    batches = split(data, 1000, 1500)
    expected = slow_best(batches[-1], shrinking(data.abs().max()), 4)
    assert absmax_of(SymmetricOMSE(4), *batches) == expected


@pytest.mark.parametrize("name", ["omse", "mse"])
def test_the_search_loses_no_more_than_minmax(data, name):
    bits = 5
    qmin, qmax = integer_range(bits)
    tops = absmax_of(make_calibrator(name, bits), data), data.abs().max()
    ours, minmax = (slow_loss(data, np.float32(top) / qmax, qmin, qmax) for top in tops)
    assert ours <= minmax


def slow_affine_omse(x, low, high, bits):
    """FQ-ViT's OmseObserver, in float64 where it does not decide on a code."""
    qmin, qmax = integer_range(bits)
    best, result = math.inf, None
    for i in range(90):
        bottom, top = low * (1 - 0.01 * i), high * (1 - 0.01 * i)
        scale = (top - bottom) / (qmax - qmin)
        zero = np.clip(qmin - np.rint(bottom / scale), qmin, qmax)
        score = slow_loss(x, scale, qmin - zero, qmax - zero) / len(x)
        if score < best:
            best, result = score, (bottom, top)
    return result


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["normal", "heavy tailed", "an outlier", "one-sided"])
def test_affine_omse_agrees_with_a_slow_search(kind, bits):
    batches = split(DATA[kind](), 1000, 1500)
    x = torch.cat(batches)
    expected = slow_affine_omse(batches[-1], x.min().item(), x.max().item(), bits)
    actual = updated(AffineOMSE(bits), *batches).range()
    np.testing.assert_allclose([bound.item() for bound in actual], expected, rtol=1e-6)


@pytest.mark.parametrize("offset", [-8.0, 8.0])
def test_affine_omse_covers_zero(offset):
    x = torch.rand(500) * 2 + offset
    covered = updated(AffineOMSE(8), x).range()
    scale, zero_point = affine_qparams(covered, 8)
    ends = sorted((0.0, offset + (2 if offset > 0 else 0)))
    np.testing.assert_allclose([covered.low, covered.high], ends, rtol=2e-2, atol=1e-6)
    assert zero_point == (-128 if offset > 0 else 127)
    code = torch.clamp(torch.round(x / scale) + zero_point, -128, 127)
    assert ((code - zero_point) * scale - x).abs().max() <= 0.51 * scale


def test_affine_qparams_by_hand():
    scale, zero_point = affine_qparams(updated(MinMax(), torch.tensor([-1.0, 3.0])).range(), 3)
    assert scale.item() == pytest.approx(4 / 7)
    assert zero_point == -2  # of -4 .. 3: -1.75 steps below zero round to two
    assert affine_qparams(updated(MinMax(), torch.zeros(3)).range(), 8) == (1, -128)


@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("sizes", [(), (1,), (1000, 1500), (1, 1, 3000)])
def test_mse_agrees_with_a_slow_search_in_any_batches(data, sizes, bits):
    top = np.float64(data.abs().max())
    expected = slow_best(data, [np.float32(k * top / 100) for k in range(1, 101)], bits)
    assert absmax_of(MeanSquaredError(bits), *split(data, *sizes)) == expected


def test_mse_of_a_range_that_grows():
    """The spacing doubles, twice here; what was tried before is known, and the rest follows s^2."""
    first, second = torch.rand(5000) * 2 - 1, 3 * (torch.rand(700) * 2 - 1)
    first[0], second[0] = 1, 3
    calibrator = updated(MeanSquaredError(4), first, second)
    both = torch.cat([first, second])
    candidates = [np.float32(k * 4 / 100) for k in range(1, 101)]
    exact = [slow_loss(both, top / np.float32(7), -8, 7) for top in candidates]
    losses = calibrator._losses.numpy()
    np.testing.assert_allclose(losses[:25], exact[:25], rtol=1e-9)  # up to the top of the first
    np.testing.assert_allclose(losses[25:75], exact[25:75], rtol=0.2)
    assert calibrator.absmax().item() == pytest.approx(slow_best(both, candidates, 4), rel=0.06)


def test_mse_never_covers_more_than_it_saw():
    calibrator = updated(MeanSquaredError(8), torch.ones(1), torch.full((50,), 1.01))
    assert calibrator.absmax() == np.float32(1.01)


# ------------------------------------------------------------------------------------- entropy


def slow_histogram(x, width, bins):
    position = np.floor(np.abs(x.numpy()).astype(np.float32) / np.float32(width))
    return np.bincount(np.minimum(position, bins - 1).astype(int), minlength=bins)


def slow_divergences(counts, levels):
    """The divergence of each range as TensorRT's rule is described, bin by bin."""
    counts = counts.astype(np.float64)
    counts[0] = counts[1]
    divergences = []
    for bins in range(levels, len(counts) + 1):
        reference = counts[:bins].copy()
        reference[-1] += counts[bins:].sum()
        level = np.arange(bins) * levels // bins
        filled = counts[:bins] > 0
        mass = np.bincount(level[filled], counts[:bins][filled], minlength=levels)
        share = np.bincount(level[filled], minlength=levels)
        quantized = np.where(filled, (mass / np.maximum(share, 1))[level], 0)
        if quantized.sum() == 0 or (quantized[-1] == 0 and reference[-1] > 0):
            divergences.append(np.inf)
            continue
        p, q = reference[reference > 0], quantized[reference > 0]
        divergences.append(np.sum(p / p.sum() * np.log((p / p.sum()) / (q / quantized.sum()))))
    return divergences


def slow_entropy(counts, levels):
    """Return how many bins the range of the smallest divergence has, of equal ones the widest."""
    divergences = slow_divergences(counts, levels)
    return levels + len(divergences) - 1 - int(np.argmin(divergences[::-1]))


def test_divergences_agree_with_a_slow_version():
    for x in (torch.randn(50_000), heavy_tailed(50_000), torch.rand(50_000)):
        counts = slow_histogram(x, x.abs().max().item() / 300, 300)
        counts[40:43] = 0
        actual = entropy.divergences(torch.tensor(counts), 8)
        np.testing.assert_allclose(actual, slow_divergences(counts, 8), rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("sizes", [(), (1, 1000)])
def test_kl_agrees_with_a_slow_search_in_any_batches(data, sizes, bits):
    width = data.abs().max().item() / 2048
    bins = slow_entropy(slow_histogram(data, width, 2048), 2 ** (bits - 1))
    assert absmax_of(Entropy(bits), *split(data, *sizes)) == np.float32(bins * width)


@pytest.mark.parametrize("values", [2, 9, 100])
def test_kl_of_few_values_covers_them_all(values):
    """Many ranges lose nothing, so rounding must not choose among them: images are like this."""
    x = torch.randint(-values, values + 1, (3000,)) / values * 1.7
    width = x.abs().max().item() / 2048
    assert slow_entropy(slow_histogram(x, width, 2048), 128) == 2048
    assert absmax_of(Entropy(8), x) == x.abs().max()


@pytest.mark.parametrize("factor", [1.5, 30])
def test_kl_of_a_range_that_grows(factor, monkeypatch):
    """Bins are added, and merged when they become too many."""
    monkeypatch.setattr(entropy, "MOST_BINS", 4096)
    first, second = torch.randn(3000), factor * torch.randn(3000)
    calibrator = updated(Entropy(8), first, second)
    width, merged = first.abs().max().item() / 2048, 1
    while second.abs().max() > 4096 * merged * width:
        merged *= 2
    assert (merged > 1) == (factor > 2)
    counts = slow_histogram(second, merged * width, len(calibrator._counts))
    # the first batch's largest value lies on the end of its last bin
    counts[: 2048 // merged] += slow_histogram(first, width, 2048).reshape(-1, merged).sum(1)
    np.testing.assert_array_equal(calibrator._counts.numpy(), counts)
    assert 2048 < len(counts) <= 4096
    expected = slow_entropy(counts, 128) * merged * width
    assert calibrator.absmax() == np.float32(expected)


def test_kl_of_a_range_that_grows_to_an_odd_number_of_bins(monkeypatch):
    monkeypatch.setattr(entropy, "MOST_BINS", 4096)
    batches = [torch.full((7,), bins / 2048) for bins in (2048, 2048.5, 5000)]
    assert len(updated(Entropy(8), *batches[:2])._counts) == 2049
    assert updated(Entropy(8), *batches)._counts.sum() == 21  # none is lost where bins are merged


def test_kl_clips_a_far_outlier_of_laplace_data():
    x = torch.distributions.Laplace(0.0, 1.0).sample((20000,))
    x[7] = 60
    assert absmax_of(Entropy(8), x) < 30


def test_kl_of_more_bits_than_bins():
    with pytest.raises(ValueError, match="kl searches grids of at most 12 bits, got 13"):
        Entropy(13)
    x = torch.randn(100)
    assert absmax_of(Entropy(12), x) == x.abs().max()


# ------------------------------------------------------------------------------------- all of them


@each
def test_every_calibrator_scales_with_its_data(name, data):
    batches = split(data, 1000)
    once = absmax_of(ALL[name](), *batches)
    assert absmax_of(ALL[name](), *(4 * batch for batch in batches)) == 4 * once
    assert once <= data.abs().max()


@each
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_every_type_gives_float32_ranges(name, dtype):
    x = torch.randn(4, 300).to(dtype)
    result = absmax_of(ALL[name](), x)
    assert result.dtype == torch.float32
    assert result.shape == ()
    assert result == absmax_of(ALL[name](), x.float())


@each
def test_a_constant_is_covered(name):
    assert absmax_of(ALL[name](), torch.full((3, 50), -0.37)) == np.float32(0.37)


@each
def test_zeros_need_no_range(name):
    assert absmax_of(ALL[name](), torch.zeros(5), torch.zeros(70)) == 0
    mixed = absmax_of(ALL[name](), torch.zeros(70), torch.full((70,), 2.0))
    assert 0 < mixed <= 2


@each
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_bad_value_is_not_lost(name, bad):
    for size in (7, 9000):
        for when in range(3):
            batches = [torch.randn(size) for _ in range(3)]
            batches[when][5] = bad
            assert not absmax_of(ALL[name](), *batches).isfinite()


@each
def test_an_empty_batch_says_nothing(name):
    x, empty = torch.randn(300), torch.empty(0, 4)
    assert absmax_of(ALL[name](), empty, x, empty) == absmax_of(ALL[name](), x)


@each
def test_a_calibrator_without_data_says_so(name):
    for calibrator in (ALL[name](), updated(ALL[name](), torch.empty(0))):
        with pytest.raises(ValueError, match="the calibrator has seen no data"):
            calibrator.absmax()


@each
def test_views_and_gradients(name):
    x = torch.randn(40, 30, requires_grad=True)
    result = absmax_of(ALL[name](), x.t())
    assert not result.requires_grad
    assert result == absmax_of(ALL[name](), x.detach().t().contiguous())


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        return [value]
    inner = value if isinstance(value, tuple) else getattr(value, "__dict__", {}).values()
    return [tensor for part in inner for tensor in tensors_in(part)]


@each
def test_no_calibrator_keeps_its_data(name):
    calibrator = updated(ALL[name](), torch.randn(200_000), 50 * torch.randn(200_000))
    kept = sum(tensor.untyped_storage().nbytes() for tensor in tensors_in(calibrator))
    assert kept <= 2**17


@pytest.mark.parametrize("name", SEARCHING)
def test_what_is_searched_depends_on_the_bits(name):
    x = heavy_tailed(20000)
    tops = [absmax_of(make_calibrator(name, bits), x) for bits in (3, 5, 8)]
    assert tops[0] < tops[1] < tops[2]


def test_a_calibrator_by_name_or_by_function():
    assert isinstance(make_calibrator("ema", 4), MovingAverage)
    assert make_calibrator("omse", 4).bits == 4
    assert make_calibrator(lambda: Percentile(50), 4).percent == 50


@pytest.mark.parametrize("name", CALIBRATORS)
def test_a_quantized_model_has_the_ranges_of_its_calibrator(name):
    batches = [heavy_tailed(40, 6) for _ in range(2)]
    model = quantize(torch.nn.Sequential(torch.nn.Linear(6, 5)), 4, calibrator=name, data=batches)
    site = quantizers(model)["0.input_quantizer"]
    assert site.absmax == absmax_of(make_calibrator(name, 4), *batches)
    assert site.scale == site.absmax / 7
