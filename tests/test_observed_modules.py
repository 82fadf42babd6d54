"""LayerNorm and activations that observe themselves, as ops on CPU, against plain autograd."""

import pytest
import torch
from torch.nn import functional

from quanttune import reference
from quanttune.reference.observed_modules import KINDS

OPS = torch.ops.quanttune
EPS = 1e-5
# Relative error of gradients by norm; of float32, against float64: measured below 3e-7.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-6}

ACTIVATIONS = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}


def assert_near(actual, expected, tolerance):
    assert actual.shape == expected.shape
    assert (actual - expected).norm() <= tolerance * expected.norm()


def make_ratio_grads(samples):
    ratio_grads = torch.randn(2, samples) * 0.1
    ratio_grads[0, 0] = 0  # as if the first sample's input were not observed
    return ratio_grads


def expected_gradients(function, x, parameters, grad, ratio_grads, options):
    """Return the gradients of the task's loss and of the ratios on both sides, by autograd."""
    leaves = [None if t is None else t.double().requires_grad_() for t in (x, *parameters)]
    observed, of_x = reference.observe(leaves[0], len(x), **options)
    y, of_y = reference.observe(function(observed, *leaves[1:]), len(x), **options)
    ratios = (of_x.ratio * ratio_grads[0]).sum() + (of_y.ratio * ratio_grads[1]).sum()
    loss = (y * grad).sum() + ratios
    present = [leaf for leaf in leaves if leaf is not None]
    gradients = list(torch.autograd.grad(loss, present))
    return [x.new_empty(0) if leaf is None else gradients.pop(0) for leaf in leaves]


@pytest.mark.parametrize("detach_deviation", [False, True])
@pytest.mark.parametrize("given", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 3, 5, 33), (4, 1, 6), (2, 90, 768)])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_layer_norm(dtype, shape, given, detach_deviation):
    width, samples = shape[-1], shape[0]
    x, grad = torch.randn(shape).to(dtype), (torch.randn(shape) * 1e-2).to(dtype)
    parameters = [torch.randn(width).to(dtype) if there else None for there in given]
    ratio_grads = make_ratio_grads(samples)
    y, mean, rstd, *of_both = OPS.observed_layer_norm(x, *parameters, EPS, samples, False)
    assert torch.equal(y, functional.layer_norm(x, (width,), *parameters, EPS))
    assert torch.equal(of_both[0], OPS.outlier_statistics(x, samples, False))
    assert torch.equal(of_both[1], OPS.outlier_statistics(y, samples, False))
    actual = OPS.observed_layer_norm_backward(
        grad, x, *parameters, EPS, mean, rstd, *of_both, *ratio_grads, False, detach_deviation
    )
    expected = expected_gradients(
        lambda x, *affine: functional.layer_norm(x, (width,), *affine, EPS),
        x,
        parameters,
        grad,
        ratio_grads,
        {"detach_deviation": detach_deviation},
    )
    for gradient, wanted in zip(actual, expected, strict=True):
        assert gradient.dtype == dtype
        assert_near(gradient, wanted, TOLERANCES[dtype])


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("shape", [(3, 5, 7), (1, 1), (2, 90, 768)])
@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_activation(dtype, kind, shape, exact):
    samples = shape[0]
    x, grad = torch.randn(shape).to(dtype), (torch.randn(shape) * 1e-2).to(dtype)
    ratio_grads = make_ratio_grads(samples)
    y, *of_both = OPS.observed_activation(x, kind, samples, exact)
    assert torch.equal(y, ACTIVATIONS[kind](x))
    assert torch.equal(of_both[0], OPS.outlier_statistics(x, samples, exact))
    assert torch.equal(of_both[1], OPS.outlier_statistics(y, samples, exact))
    actual = OPS.observed_activation_backward(grad, x, kind, *of_both, *ratio_grads, exact, False)
    assert actual.dtype == dtype
    (expected,) = expected_gradients(ACTIVATIONS[kind], x, [], grad, ratio_grads, {"exact": exact})
    assert_near(actual, expected, TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype):
    """What float32 gives for the same numbers, but for a rounding at the end."""
    x, grad = torch.randn(2, 40, 33).to(dtype), torch.randn(2, 40, 33).to(dtype)
    weight, bias = torch.randn(33).to(dtype), torch.randn(33).to(dtype)
    ratio_grads = make_ratio_grads(2) * 100
    y, mean, rstd, *of_both = OPS.observed_layer_norm(x, weight, bias, EPS, 2, False)
    assert (y.dtype, mean.dtype, rstd.dtype) == (dtype, torch.float32, torch.float32)
    wide = [tensor.float() for tensor in (x, weight, bias)]
    assert torch.equal(y, functional.layer_norm(wide[0], (33,), *wide[1:], EPS).to(dtype))
    assert torch.equal(of_both[1], OPS.outlier_statistics(y, 2, False))
    arguments = (mean, rstd, *of_both, *ratio_grads, False, False)
    actual = OPS.observed_layer_norm_backward(grad, x, weight, bias, EPS, *arguments)
    total = OPS.outlier_statistics_backward(
        grad.float(), y.float(), of_both[1], ratio_grads[1], False, False
    )
    wide_x, *_ = wide = [tensor.requires_grad_() for tensor in wide]
    plain = torch.autograd.grad(functional.layer_norm(wide_x, (33,), *wide[1:], EPS), wide, total)
    total = OPS.outlier_statistics_backward(
        plain[0], wide_x.detach(), of_both[0], ratio_grads[0], False, False
    )
    for gradient, wanted in zip(actual, (total, *plain[1:]), strict=True):
        assert torch.equal(gradient, wanted.to(dtype))


def test_a_gradient_of_zeros_leaves_the_plain_gradient():
    x, grad = torch.randn(3, 8, 10), torch.randn(3, 8, 10)
    x[1, 2, 3] = torch.nan
    weight, bias = torch.randn(10), torch.randn(10)
    _, mean, rstd, *of_both = OPS.observed_layer_norm(x, weight, bias, EPS, 3, False)
    assert of_both[0][1].isnan().all()
    zeros = torch.zeros(3)
    actual = OPS.observed_layer_norm_backward(
        grad, x, weight, bias, EPS, mean, rstd, *of_both, zeros, zeros, False, False
    )
    leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
    plain = torch.autograd.grad(
        functional.layer_norm(leaves[0], (10,), *leaves[1:], EPS), leaves, grad
    )
    for gradient, wanted in zip(actual, plain, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=0, atol=0, equal_nan=True)


TENSORS = {
    "contiguous": lambda: torch.randn(4, 3, 33),
    "transposed": lambda: torch.randn(33, 3, 4).transpose(0, 2),
    "bfloat16": lambda: torch.randn(4, 3, 33).bfloat16(),
    "float64": lambda: torch.randn(4, 3, 33, dtype=torch.float64),
    "expanded": lambda: torch.randn(1, 1, 33).expand(4, 3, 33),
    "matrix": lambda: torch.randn(4, 33),
}


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("tensor", TENSORS)
def test_opcheck_of_layer_norm(tensor, given):
    x, grad = TENSORS[tensor](), TENSORS[tensor]()
    parameters = [torch.randn(33).to(x.dtype) if given else None for _ in range(2)]
    forward = (x, *parameters, EPS, 2, given)
    torch.library.opcheck(OPS.observed_layer_norm.default, forward)
    _, *saved = OPS.observed_layer_norm(*forward)
    backward = (grad, x, *parameters, EPS, *saved, *make_ratio_grads(2), given, given)
    torch.library.opcheck(OPS.observed_layer_norm_backward.default, backward)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tensor", TENSORS)
def test_opcheck_of_activation(tensor, kind):
    x, grad = TENSORS[tensor](), TENSORS[tensor]()
    torch.library.opcheck(OPS.observed_activation.default, (x, kind, 2, False))
    _, *of_both = OPS.observed_activation(x, kind, 2, False)
    backward = (grad, x, kind, *of_both, *make_ratio_grads(2), False, True)
    torch.library.opcheck(OPS.observed_activation_backward.default, backward)


def test_nothing():
    x, weight = torch.empty(0, 5, 6), torch.randn(6)
    y, *saved = OPS.observed_layer_norm(x, weight, None, EPS, 0, False)
    ratio_grads = torch.empty(2, 0)
    total, weight_grad, bias_grad = OPS.observed_layer_norm_backward(
        y, x, weight, None, EPS, *saved, *ratio_grads, False, False
    )
    assert (total.shape, saved[0].shape, saved[3].shape) == (x.shape, (0, 5), (0, 7))
    assert torch.equal(weight_grad, torch.zeros(6))
    assert bias_grad.shape == (0,)
    y, *of_both = OPS.observed_activation(x, "gelu", 0, False)
    total = OPS.observed_activation_backward(y, x, "gelu", *of_both, *ratio_grads, False, False)
    assert y.shape == total.shape == x.shape
