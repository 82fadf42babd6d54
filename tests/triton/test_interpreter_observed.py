"""LayerNorm and activations that observe themselves, on Triton, against float64 PyTorch.

The outlier terms are those of the reference for the y that the kernel has stored. On a GPU if there
is one, else in Triton's interpreter.
"""

import importlib

import pytest
import torch
from interpreted import DEVICE, HAS_GPU, KINDS, assert_same_bits, make_rows
from torch.nn import functional

from quanttune import reference, triton_kernels
from quanttune.reference import (
    DEVIATION,
    MAXIMUM,
    MAXIMUM_COUNT,
    MEAN,
    MEDIAN,
    MEDIAN_COUNT,
    RATIO,
    observed_modules,
)

layer_norm_module = importlib.import_module("quanttune.triton_kernels.observed_layer_norm")
gradient_module = importlib.import_module("quanttune.triton_kernels.observed_layer_norm_gradient")
activation_module = importlib.import_module("quanttune.triton_kernels.observed_activation")

EXACT_COLUMNS = [MAXIMUM, MEDIAN, MAXIMUM_COUNT, MEDIAN_COUNT]
EPS = 1e-5
SINGLE = 2.0**-24  # a rounding of float32
# a rounding of what is stored; the interpreter truncates to bfloat16
STORED = {torch.float32: SINGLE, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
STORED[torch.bfloat16] *= 1 if HAS_GPU else 2

ACTIVATIONS = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}


def assert_near(actual, truth, scale, roundings):
    """Let float32 err by some roundings of a scale, and storing by one of the truth."""
    smallest = torch.finfo(actual.dtype).smallest_normal
    bound = roundings * SINGLE * scale + STORED[actual.dtype] * truth.abs() + smallest
    excess = ((actual.double() - truth).abs() - bound).max()
    assert excess <= 0, excess


def check_statistics(actual, x, samples, exact):
    expected = reference.outlier_statistics(x, samples, exact)
    assert torch.equal(actual[:, EXACT_COLUMNS], expected[:, EXACT_COLUMNS])
    # as the gate of the statistics alone, with the second order of a mean far from zero
    deviation, mean = expected[:, DEVIATION].double(), expected[:, MEAN].double()
    shift = mean.abs() / torch.where(deviation == 0, 1, deviation)
    gate = 20 * SINGLE + (8 * SINGLE * shift).square()
    for column in (DEVIATION, RATIO):
        assert ((actual - expected)[:, column].abs() <= gate * expected[:, column]).all()
    assert ((actual[:, MEAN] - mean).abs() <= gate * torch.maximum(mean.abs(), deviation)).all()


def add_ratios(grad, x, statistics, ratio_grad, options):
    """Return in float64 what the gradient of a tensor is with that of its ratios."""
    return reference.outlier_statistics_backward(
        grad.double(), x.double(), statistics.double(), ratio_grad.double(), *options
    )


def make_parameter(width, dtype, kind):
    if kind == "none":
        return None
    return (torch.randn(width) if kind == "bias" else 1 + torch.randn(width) / 2).to(DEVICE, dtype)


def make_gradients(x):
    """Return that of y, and those of the ratios, of which some are not observed."""
    grad = (torch.randn(x.shape) * 1e-2).to(DEVICE, x.dtype)
    ratio_grads = (torch.randn(2, len(x)) * 0.1).to(DEVICE)
    if len(x) > 1:
        ratio_grads[0, 0], ratio_grads[1, -1] = 0, 0
    return grad, ratio_grads


def check_layer_norm(x, weight, bias, exact=False, detach_deviation=False):
    """x: (samples, tokens, width)"""
    samples, width, options = len(x), x.shape[-1], (exact, detach_deviation)
    forward = triton_kernels.observed_layer_norm(x, weight, bias, EPS, samples, exact)
    y, mean, rstd, of_x, of_y = forward
    assert (y.dtype, y.shape, mean.shape, rstd.shape) == (x.dtype, x.shape, *[x.shape[:-1]] * 2)
    assert mean.dtype == rstd.dtype == torch.float32
    wide = [None if t is None else t.double().requires_grad_() for t in (x, weight, bias)]
    truth = functional.layer_norm(wide[0], (width,), *wide[1:], EPS)
    wide_rstd = (wide[0].detach().var(-1, correction=0) + EPS).rsqrt()
    size = x.double().abs().amax(-1)
    gain = 1.0 if weight is None else weight.double().abs()
    offset = 0.0 if bias is None else bias.double().abs()
    assert_near(mean, wide[0].detach().mean(-1), size, 8)
    # the variance of a token far from zero comes from differences
    amplified = (size * wide_rstd)[..., None]
    assert_near(rstd, wide_rstd, wide_rstd * (1 + SINGLE * amplified[..., 0].square()), 12)
    assert_near(y, truth.detach(), (amplified + 1) * gain + offset, 8)
    check_statistics(of_x, x, samples, exact)
    check_statistics(of_y, y, samples, exact)

    grad, ratio_grads = make_gradients(x)
    actual = triton_kernels.observed_layer_norm_backward(
        grad, x, weight, bias, EPS, mean, rstd, of_x, of_y, *ratio_grads, *options
    )
    grad_y = add_ratios(grad, y, of_y, ratio_grads[1], options)
    present = [t for t in wide if t is not None]
    gradients = list(torch.autograd.grad(truth, present, grad_y))
    expected = [None if t is None else gradients.pop(0) for t in wide]
    plain = expected[0]
    expected[0] = add_ratios(plain, x, of_x, ratio_grads[0], options)
    normalized = (wide[0].detach() - wide[0].detach().mean(-1, keepdim=True)) * wide_rstd[..., None]
    terms = grad.double().abs() + (grad_y - grad).abs()
    scale = (terms * gain).amax(-1, keepdim=True) * wide_rstd[..., None] * (amplified + 1)
    assert_near(actual[0], expected[0], scale + (expected[0] - plain).abs(), 16)
    summed = (terms * (1 + normalized.abs()) * (amplified + 1)).sum((0, 1))
    for index in (1, 2):
        if wide[index] is None:
            assert actual[index].shape == (0,)
        else:
            assert actual[index].dtype == x.dtype
            assert_near(actual[index], expected[index], summed, 8)


# strata of 1 to 6 elements, some of which lie in two parts
@pytest.mark.parametrize(
    ("width", "tokens", "kinds", "detach_deviation"),
    [
        (1, 50, ["constant", "normal"], False),
        (7, 400, ["ties", "shifted"], False),
        (33, 40, KINDS, False),
        (100, 31, ["normal", "outlier first"], True),
    ],
)
def test_layer_norm(width, tokens, kinds, detach_deviation, small_sample):
    x = make_rows(kinds, tokens * width, torch.float32).view(-1, tokens, width)
    weight, bias = (make_parameter(width, x.dtype, kind) for kind in ("weight", "bias"))
    check_layer_norm(x, weight, bias, detach_deviation=detach_deviation)


@pytest.mark.parametrize(("width", "dtype"), [(33, torch.float16), (40, torch.bfloat16)])
def test_layer_norm_of_half_precision(width, dtype, small_sample):
    x = make_rows(["ties", "normal"], 31 * width, dtype).view(-1, 31, width)
    weight, bias = (make_parameter(width, dtype, kind) for kind in ("weight", "bias"))
    check_layer_norm(x, weight, bias)


@pytest.mark.parametrize("kinds", [("none", "none"), ("weight", "none"), ("none", "bias")])
def test_layer_norm_without_weight_or_bias(kinds, small_sample):
    x = make_rows(["normal"], 990, torch.float32).view(1, 30, 33)
    check_layer_norm(x, *(make_parameter(33, x.dtype, kind) for kind in kinds), exact=True)


@pytest.mark.parametrize(("tokens", "width"), [(301, 33), (5, 3000)])
def test_layer_norm_of_parts_of_several_tiles(tokens, width, monkeypatch, small_sample):
    for module in (layer_norm_module, gradient_module):
        monkeypatch.setattr(module, "PROGRAMS", 2)
    x = make_rows(["shifted"], tokens * width, torch.float32).view(1, tokens, width)
    weight, bias = (make_parameter(width, x.dtype, kind) for kind in ("weight", "bias"))
    check_layer_norm(x, weight, bias)


def check_activation(x, kind, exact=False, detach_deviation=False):
    """x: (samples, elements)"""
    samples, options = len(x), (exact, detach_deviation)
    y, of_x, of_y = triton_kernels.observed_activation(x, kind, samples, exact)
    assert (y.dtype, y.shape) == (x.dtype, x.shape)
    wide = x.double().requires_grad_()
    truth = ACTIVATIONS[kind](wide)
    assert_near(y, truth.detach(), wide.detach().abs(), 4)
    check_statistics(of_x, x, samples, exact)
    check_statistics(of_y, y, samples, exact)

    grad, ratio_grads = make_gradients(x)
    actual = triton_kernels.observed_activation_backward(
        grad, x, kind, of_x, of_y, *ratio_grads, *options
    )
    grad_y = add_ratios(grad, y, of_y, ratio_grads[1], options)
    (plain,) = torch.autograd.grad(truth, wide, grad_y)
    expected = add_ratios(plain, x, of_x, ratio_grads[0], options)
    terms = grad.double().abs() + (grad_y - grad).abs() + (expected - plain).abs()
    assert_near(actual, expected, terms, 16)


@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize(
    ("size", "kinds", "detach_deviation"),
    [(7, ["ties", "normal"], True), (5001, ["ties"], False)],
)
def test_activation(size, kinds, detach_deviation, kind, small_sample):
    x = make_rows(kinds, size, torch.float32)
    check_activation(x, kind, detach_deviation=detach_deviation)


@pytest.mark.parametrize(("size", "kinds"), [(1, ["zeros", "normal"]), (513, KINDS)])
def test_activation_of_every_kind_of_row(size, kinds, small_sample):
    check_activation(make_rows(kinds, size, torch.float32), "gelu")


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("relu", torch.float16), ("gelu", torch.bfloat16), ("gelu_tanh", torch.float16)],
)
def test_activation_of_half_precision(kind, dtype, small_sample):
    check_activation(make_rows(["ties", "normal"], 1025, dtype), kind)


@pytest.mark.parametrize("exact", [False, True])
def test_activation_of_parts_of_several_tiles(exact, monkeypatch, small_sample):
    monkeypatch.setattr(activation_module, "PROGRAMS", 2)
    x = make_rows(["shifted"], 17 * 1024 + 5, torch.float32)
    check_activation(x - 100 * exact, "gelu", exact)


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activation_of_huge_values(kind):
    size = torch.tensor([100.0, 6e4, 1e15, 1e20, 3e38])
    x = torch.cat([size, -size])[None].to(DEVICE)
    y, of_x, of_y = triton_kernels.observed_activation(x, kind, 1, False)
    assert torch.equal(y, x.clamp(min=0))
    zero = torch.zeros(1, device=DEVICE)
    grad = torch.full_like(x, 3.0)
    actual = triton_kernels.observed_activation_backward(
        grad, x, kind, of_x, of_y, zero, zero, False, False
    )
    assert torch.equal(actual, 3.0 * (x > 0))


# ------------------------------------------------------------------------------- of both


def observe_all(x, weight):
    """Return what the forward and backward passes give, sample by sample."""
    samples, width = len(x), x.shape[-1]
    grad = torch.linspace(-1, 1, width, device=DEVICE).to(x.dtype).expand(x.shape).contiguous()
    # nobody asks for the ratios of the second sample
    ratio_grad = torch.ones(samples, device=DEVICE)
    ratio_grad[1] = 0
    y, mean, rstd, *of_both = triton_kernels.observed_layer_norm(
        x, weight, None, EPS, samples, False
    )
    total, _, _ = triton_kernels.observed_layer_norm_backward(
        grad, x, weight, None, EPS, mean, rstd, *of_both, ratio_grad, ratio_grad, False, False
    )
    results = [y, *of_both, total]
    y, *of_both = triton_kernels.observed_activation(x, "gelu", samples, False)
    total = triton_kernels.observed_activation_backward(
        grad, x, "gelu", *of_both, ratio_grad, ratio_grad, False, False
    )
    return [*results, y, *of_both, total]


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")
@pytest.mark.parametrize(
    ("bad", "dtype"),
    [(torch.nan, torch.float32), (torch.inf, torch.bfloat16)],
)
def test_bad_samples_leave_others_alone(bad, dtype):
    clean = make_rows(["normal"] * 3, 297, dtype).view(3, 9, 33)
    weight = make_parameter(33, dtype, "weight")
    x = clean.clone()
    x[:2, 4, 5] = bad
    others = [token for token in range(9) if token != 4]
    for spoiled, expected in zip(observe_all(x, weight), observe_all(clean, weight), strict=True):
        assert_same_bits(spoiled[2], expected[2])
        if spoiled.shape == (3, reference.COLUMNS):
            assert spoiled[:2].isnan().all()
        else:
            # no ratio reaches the second sample: its other tokens keep their numbers
            assert_same_bits(spoiled[1, others], expected[1, others])


def test_nothing_and_float64_and_wider_tokens_are_the_reference(monkeypatch):
    for module in (layer_norm_module, gradient_module):
        monkeypatch.setattr(module, "MAX_COLUMNS", 8)
    ratio_grad = torch.ones(2, device=DEVICE)
    for x in (torch.randn(2, 5, 8).double(), torch.randn(2, 5, 9)):
        x, grad = x.to(DEVICE), torch.ones_like(x).to(DEVICE)
        forward = (x, None, None, EPS, 2, False)
        expected = observed_modules.observed_layer_norm(*forward)
        actual = triton_kernels.observed_layer_norm(*forward)
        assert all(map(torch.equal, actual, expected))
        backward = (grad, x, None, None, EPS, *expected[1:], ratio_grad, ratio_grad, False, False)
        expected = observed_modules.observed_layer_norm_backward(*backward)
        actual = triton_kernels.observed_layer_norm_backward(*backward)
        assert all(map(torch.equal, actual, expected))
    x = torch.randn(2, 40, device=DEVICE).double()
    expected = observed_modules.observed_activation(x, "gelu", 2, False)
    actual = triton_kernels.observed_activation(x, "gelu", 2, False)
    assert all(map(torch.equal, actual, expected))
    backward = (x, x, "gelu", *expected[1:], ratio_grad, ratio_grad, False, False)
    expected = observed_modules.observed_activation_backward(*backward)
    assert torch.equal(triton_kernels.observed_activation_backward(*backward), expected)
    empty = torch.empty(0, 5, 8, device=DEVICE)
    assert triton_kernels.observed_layer_norm(empty, None, None, EPS, 0, False)[3].shape == (0, 7)
    assert triton_kernels.observed_activation(empty, "relu", 0, False)[1].shape == (0, 7)


class Recording(triton_kernels.StatisticsGroup):
    """A group that keeps what it has reserved."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def reserve(self, *arguments):
        reserved = super().reserve(*arguments)
        self.rows += reserved
        return reserved


@pytest.mark.parametrize("shape", [(2, 301, 33), (1, 4140, 7), (1, 3, 3000)])
def test_both_samples_are_whole(shape, small_sample):
    """Also what lies in a stratum that the parts of two programs share."""
    x = make_rows(["normal"] * shape[0], shape[1] * shape[2], torch.float32).view(shape)
    group = Recording()
    y, *_ = triton_kernels.observed_layer_norm(x, None, None, EPS, shape[0], False, group)
    z, *_ = triton_kernels.observed_activation(x, "gelu", shape[0], False, group)
    positions = reference.sample_positions(x[0].numel(), DEVICE)
    for rows, tensor in zip(group.rows, (x, y, x, z), strict=True):
        sample = rows.sample.view(shape[0], -1)[:, : rows.sample_size]
        assert_same_bits(sample, tensor.view(shape[0], -1)[:, positions])


@pytest.mark.parametrize("size", [513, 990, 1024, 5000])
def test_the_mask_marks_the_sample(size, small_sample):
    x = torch.empty(1, size, device=DEVICE)
    module = importlib.import_module("quanttune.triton_kernels.observed_statistics")
    mask = module.sample_mask(x, size, False)
    index = torch.arange(size, device=DEVICE)
    marked = index[(mask[index // 8] >> (index % 8)) & 1 == 1]
    assert torch.equal(marked, reference.sample_positions(size, DEVICE))
    assert module.sample_mask(x, size, False) is mask
    assert module.sample_mask(x, size, True) is None
