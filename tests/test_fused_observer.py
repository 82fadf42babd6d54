"""The fused observer: the numbers of plain autograd, in every way a training step can use it."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from quanttune import fused_observer, reference

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
OPTIONS = [
    {},
    {"exact": True},
    {"detach_deviation": True},
    {"exact": True, "detach_deviation": True},
]

# Both compute in the type of the statistics, in another order: a few roundings, relative to each
# element or, for the small ones whose terms cancel, to the root mean square. The last rounding to a
# 16-bit type may fall on the other side: one ulp.
GATES = {
    torch.float32: 4e-6,
    torch.float64: 1e-10,
    torch.float16: 2.0**-10,
    torch.bfloat16: 2.0**-7,
}


def assert_within_gate(actual, expected, least=0):
    """Compare relative to each element, or to the root mean square or `least` if that is more."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    wide = expected.double()
    scale = wide.abs().clamp(min=wide.square().mean().sqrt().item()).clamp(min=least)
    assert ((actual.double() - wide).abs() <= GATES[expected.dtype] * scale).all()


def activations(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype).requires_grad_()


def gradients(observe, x, samples=None, **options):
    """Return the statistics and the gradient of a loss of both the activations and their ratio."""
    x = x.detach().requires_grad_()
    y, observed = observe(x, samples, **options)
    weights = torch.linspace(-1, 2, x.numel()).to(x.dtype).reshape(x.shape)
    ratio_weights = torch.linspace(500, 900, len(observed.ratio))
    ((y * weights).sum() + (observed.ratio * ratio_weights).sum()).backward()
    return observed, x.grad


@pytest.mark.parametrize("observe", [fused_observer.observe, reference.observe])
@pytest.mark.parametrize("dtype", DTYPES)
def test_x_passes_through_unchanged(observe, dtype):
    for x in (activations(3, 5, 7, dtype=dtype), activations(4, 9, dtype=dtype)[:, ::2]):
        y, _ = observe(x)
        assert torch.equal(y, x)
        assert y.data_ptr() == x.data_ptr()
        assert (y.dtype, y.stride(), y.requires_grad) == (x.dtype, x.stride(), True)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4, 9, 16), (3, 1023), (1, 1), (2, 70001)])
def test_swapping_the_import_changes_no_number(shape, dtype, options):
    x = activations(*shape, dtype=dtype)
    observed, slope = gradients(fused_observer.observe, x, **options)
    expected, expected_slope = gradients(reference.observe, x, **options)
    assert observed._fields == expected._fields
    for name, actual, wanted in zip(expected._fields, observed, expected, strict=True):
        # where a mean is near zero, its error counts against the deviation
        least = expected.deviation.double() if name == "mean" else 0
        assert_within_gate(actual, wanted, least)
    assert torch.equal(observed.maximum, expected.maximum)
    assert torch.equal(observed.median, expected.median)
    assert_within_gate(slope, expected_slope)
    ratios = (module.outlier_ratio(x, **options) for module in (fused_observer, reference))
    assert_within_gate(*ratios)


@pytest.mark.parametrize("module", [fused_observer, reference])
def test_ties_and_constants(module):
    x = torch.tensor([[3.0, -3, 1, 1, -1], [2, 2, 2, 2, 2]])
    observed, slope = gradients(module.observe, x)
    _, expected = gradients(reference.observe, x.double())
    assert observed.ratio[1] == 0
    assert_within_gate(slope, expected.float())
    assert torch.equal(slope[1], torch.linspace(-1, 2, 10)[5:])


@pytest.mark.parametrize("module", [fused_observer, reference])
def test_a_bad_sample_leaves_the_others_alone(module):
    x = torch.randn(3, 40)
    clean, clean_slope = gradients(module.observe, x)
    x[1, 7] = torch.nan
    observed, slope = gradients(module.observe, x)
    for actual, wanted in zip((*observed, slope), (*clean, clean_slope), strict=True):
        assert actual[1].isnan().all()
        assert torch.equal(actual[[0, 2]], wanted[[0, 2]])


@pytest.mark.parametrize("module", [fused_observer, reference])
def test_tokens_of_a_sample_may_be_flattened_into_the_first_dimension(module):
    x = torch.randn(4, 5, 8)
    observed, slope = gradients(module.observe, x)
    flat, flat_slope = gradients(module.observe, x.reshape(20, 8), samples=4)
    assert all(map(torch.equal, flat, observed))
    assert torch.equal(flat_slope, slope.reshape(20, 8))
    assert module.outlier_ratio(x, 1).shape == (1,)
    assert module.outlier_ratio(torch.tensor(3.0), samples=1).tolist() == [0.0]


@pytest.mark.parametrize("module", [fused_observer, reference])
def test_an_empty_batch(module):
    x = torch.empty(0, 5, requires_grad=True)
    y, observed = module.observe(x)
    assert [tuple(column.shape) for column in observed] == [(0,)] * 5
    (y.sum() + observed.ratio.sum()).backward()
    assert x.grad.shape == (0, 5)


@pytest.mark.parametrize("module", [fused_observer, reference])
def test_only_the_ratio_has_a_gradient(module):
    _, observed = module.observe(activations(3, 8))
    wants_gradient = {name for name, column in observed._asdict().items() if column.requires_grad}
    assert wants_gradient == {"ratio"}
    _, observed = module.observe(torch.randn(3, 8))
    assert not observed.ratio.requires_grad


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype):
    x = activations(3, 1025, dtype=dtype)
    observed, slope = gradients(fused_observer.observe, x)
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    assert {column.dtype for column in observed} == {wanted}
    assert slope.dtype == dtype


@pytest.mark.parametrize("use", ["both", "only x", "only the ratio"])
def test_whatever_part_of_the_result_is_used(use):
    x = activations(3, 40)
    (ratio_only,) = torch.autograd.grad(fused_observer.outlier_ratio(x).sum(), x)
    y, observed = fused_observer.observe(x)
    loss = torch.zeros(())
    if use != "only x":
        loss = loss + observed.ratio.sum()
    if use != "only the ratio":
        loss = loss + 2 * y.sum()
    loss.backward()
    expected = {
        "both": ratio_only + 2,
        "only x": torch.full_like(x, 2),
        "only the ratio": ratio_only,
    }
    assert torch.equal(x.grad, expected[use])


def test_upstream_gradients_of_any_layout():
    x, grad, ratio_grad = activations(6, 40), torch.randn(40, 6), torch.randn(12)
    y, observed = fused_observer.observe(x)
    outputs = y, observed.ratio
    for strided in (
        (grad.t(), ratio_grad[::2]),
        (grad[:, :1].t().expand(6, 40), ratio_grad[:1].expand(6)),
    ):
        dense = [gradient.contiguous() for gradient in strided]
        (actual,) = torch.autograd.grad(outputs, x, strided, retain_graph=True)
        (expected,) = torch.autograd.grad(outputs, x, dense, retain_graph=True)
        assert torch.equal(actual, expected)


def test_a_retained_graph_gives_the_gradient_again():
    x = activations(3, 40)
    y, observed = fused_observer.observe(x)
    loss = y.square().sum() + observed.ratio.sum()
    loss.backward(retain_graph=True)
    once = x.grad.clone()
    loss.backward()
    assert torch.equal(x.grad, 2 * once)


def test_observing_twice_adds_up():
    x = activations(3, 40)
    (once,) = torch.autograd.grad(fused_observer.outlier_ratio(x).sum(), x)
    y, first = fused_observer.observe(x)
    _, second = fused_observer.observe(y)
    (first.ratio.sum() + second.ratio.sum()).backward()
    assert_within_gate(x.grad, 2 * once)


def test_changing_the_returned_x_in_place_is_an_error():
    y, _ = fused_observer.observe(activations(3, 8) * 1)
    with pytest.raises(RuntimeError, match="modified inplace"):
        y.add_(1)


def test_changing_the_observed_tensor_in_place_is_an_error():
    x = activations(3, 8) * 1
    ratio = fused_observer.outlier_ratio(x)
    x.detach().add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        ratio.sum().backward()


@pytest.mark.parametrize("autocast_backward", [False, True])
@pytest.mark.parametrize("autocast_forward", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(dtype, autocast_forward, autocast_backward):
    x = activations(3, 1025, dtype=dtype)
    expected, expected_slope = gradients(fused_observer.observe, x)
    weights = torch.linspace(-1, 2, x.numel()).to(x.dtype).reshape(x.shape)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast_forward):
        y, observed = fused_observer.observe(x)
    assert all(map(torch.equal, observed, expected))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast_backward):
        torch.autograd.backward((y, observed.ratio), (weights, torch.linspace(500, 900, 3)))
    assert torch.equal(x.grad, expected_slope)


class Block(torch.nn.Module):
    """A layer whose input and output are observed by functions, or by modules that take part."""

    def __init__(self, module, functional):
        super().__init__()
        self.linear = torch.nn.Linear(16, 16)
        self.observers = torch.nn.ModuleList([module.FusedObserver(), module.FusedObserver()])
        self.module, self.functional = module, functional

    def observe(self, observer, x):
        if self.functional:
            x, observed = self.module.observe(x)
            return x, observed.ratio
        return observer(x), observer.ratio

    def forward(self, x):
        x, before = self.observe(self.observers[0], x)
        x, after = self.observe(self.observers[1], self.linear(x).tanh())
        return x, before.mean() + after.mean()


def train(block, x, run):
    """Return the loss and all gradients of one step."""
    x = x.detach().requires_grad_()
    block.zero_grad()
    y, outliers = run(block, x)
    loss = y.square().mean() + 0.1 * outliers
    loss.backward()
    return loss.detach(), x.grad, *(parameter.grad for parameter in block.parameters())


# a module observes nothing in the forward of a reentrant checkpoint, which runs under no_grad
@pytest.mark.parametrize(("functional", "reentrant"), [(True, False), (True, True), (False, False)])
def test_activation_checkpointing_gives_the_same_gradients(functional, reentrant):
    x, block = torch.randn(4, 5, 16), Block(fused_observer, functional)
    expected = train(block, x, lambda block, x: block(x))
    actual = train(block, x, lambda block, x: checkpoint(block, x, use_reentrant=reentrant))
    assert all(map(torch.equal, actual, expected))


def test_a_training_step_gives_the_numbers_of_the_reference():
    x = torch.randn(4, 5, 16)
    fused, plain = Block(fused_observer, functional=False), Block(reference, functional=False)
    plain.load_state_dict(fused.state_dict())
    actual, expected = (train(block, x, lambda block, x: block(x)) for block in (fused, plain))
    for got, wanted in zip(actual, expected, strict=True):
        assert_within_gate(got, wanted)


@pytest.mark.parametrize("module", [fused_observer, reference])
@pytest.mark.parametrize("options", OPTIONS)
def test_the_module_hands_its_options_on(module, options):
    x = activations(6, 70001)
    observer = module.FusedObserver(**options)
    observer(x, samples=3)
    assert torch.equal(observer.ratio, module.outlier_ratio(x, 3, **options))
    slopes = [
        torch.autograd.grad(ratio.sum(), x)[0]
        for ratio in (observer.ratio, module.outlier_ratio(x, 3, **options))
    ]
    assert torch.equal(*slopes)
    for name, value in options.items():
        assert f"{name}={value}" in repr(observer)


@pytest.mark.parametrize("module", [fused_observer, reference])
def test_the_module_observes_in_training_alone(module):
    x, observer = activations(3, 8), module.FusedObserver()
    assert observer.ratio is None
    assert not list(observer.state_dict())
    assert torch.equal(observer(x), x)
    assert observer.ratio.shape == (3,)
    with torch.no_grad():
        assert observer(x) is x
    assert observer.ratio is None
    observer(x)
    observer.eval()
    assert observer(x) is x
    assert observer.ratio is None


def test_observing_under_no_grad():
    x = activations(3, 8)
    with torch.no_grad():
        y, observed = fused_observer.observe(x)
    assert torch.equal(y, x)
    assert torch.equal(observed.ratio, fused_observer.outlier_ratio(x).detach())
    assert not observed.ratio.requires_grad


MISTAKES = [
    ([1.0], None, TypeError, "x must be a floating-point tensor, got list"),
    (torch.arange(4), None, TypeError, "floating-point tensor, got a tensor of torch.int64"),
    (torch.ones(4) * 1j, None, TypeError, "floating-point tensor, got a tensor of torch.complex64"),
    (torch.tensor(1.0), None, ValueError, "no dimension to take the samples from: give samples=1"),
    (torch.ones(4, 3), 5, ValueError, r"5 samples do not divide x of shape \(4, 3\)"),
    (torch.ones(4, 3), 0, ValueError, r"0 samples do not divide x of shape \(4, 3\)"),
    (torch.ones(4, 3), -2, ValueError, r"-2 samples do not divide x of shape \(4, 3\)"),
    (torch.ones(4, 3), 24, ValueError, r"24 samples do not divide x of shape \(4, 3\)"),
    (torch.ones(4, 0), None, ValueError, r"4 samples do not divide x of shape \(4, 0\)"),
    (torch.ones(0, 4), 2, ValueError, r"2 samples do not divide x of shape \(0, 4\)"),
]


@pytest.mark.parametrize("module", [fused_observer, reference])
@pytest.mark.parametrize(("x", "samples", "error", "message"), MISTAKES)
def test_mistakes_are_named(module, x, samples, error, message):
    with pytest.raises(error, match=message):
        module.observe(x, samples)
    with pytest.raises(error, match=message):
        module.outlier_ratio(x, samples)
