"""Fake quantization: every backend gives the bits that ONNX Runtime gives."""

import functools
import math

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

import quanttune
from quanttune import cpu, fake_quant, reference
from quanttune.fake_quantizer import dynamic_fake_quant, integer_range, scale_of
from quanttune.reference import absmax

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
properties = settings(derandomize=True, deadline=None, max_examples=100)


def assert_same_bits(actual, expected):
    """Equal shapes, dtypes and values, zeros with the same sign; any NaN equals any other."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    nan = expected.isnan()
    assert torch.equal(actual.isnan(), nan)
    bits = INTEGERS[expected.element_size()]
    wrong = (actual.contiguous().view(bits) != expected.contiguous().view(bits)) & ~nan
    assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()} differ"


def all_patterns(dtype):
    """Return every one of the 65,536 numbers of a 16-bit format, NaN and infinities included."""
    return torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype)


def values_near_ties(count, scale, qmax):
    """Return `count` float32 values, most of them within 2 ulp of a tie between two codes."""
    code = torch.randint(-qmax - 3, qmax + 4, (count,))
    value = ((code.double() + 0.5) * scale).float()
    ulps = torch.randint(-2, 3, (count,), dtype=torch.int32)
    value = (value.view(torch.int32) + ulps).view(torch.float32)
    elsewhere = torch.randn(count) * scale * qmax / 2
    return torch.where(torch.rand(count) < 0.25, elsewhere, value)


def slope(x, *arguments, **options):
    """Return d fake_quant(x).sum() / dx."""
    x = x.detach().requires_grad_()
    fake_quant(x, *arguments, **options).sum().backward()
    return x.grad


@pytest.mark.parametrize("bits", [4, 6, 7, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_all_patterns_of_a_16_bit_format(dtype, bits):
    x = all_patterns(dtype)
    grad = torch.randn(x.numel()).to(dtype)
    # the last ones overflow and underflow the format when a code is multiplied by them
    extreme = (4e4, 3e-8) if dtype == torch.float16 else (1.9e38, 1e-37)
    for scale in (1.0, 0.1, 37.7 / 127, *extreme):
        grid = torch.tensor(scale), *integer_range(bits), None
        assert_same_bits(cpu.fake_quant(x, *grid), reference.fake_quant(x, *grid))
        actual = cpu.fake_quant_backward(grad, x, *grid)
        assert_same_bits(actual, reference.fake_quant_backward(grad, x, *grid))


@pytest.mark.parametrize("bits", [2, 3, 8, 16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_random_values_and_ties(dtype, bits):
    special = torch.tensor([0.0, -0.0, torch.nan, torch.inf, -torch.inf, 1e-45, -1e-45, 3e38])
    for scale in (1.0, 0.013, 2.0**-130, 1e30):
        near = values_near_ties(40001, scale, integer_range(bits)[1])
        x = torch.cat([near, special, -special]).to(dtype)
        grad = torch.randn(x.numel()).to(dtype)
        for narrow in (False, True):
            grid = torch.tensor(scale), *integer_range(bits, narrow), None
            assert_same_bits(cpu.fake_quant(x, *grid), reference.fake_quant(x, *grid))
            actual = cpu.fake_quant_backward(grad, x, *grid)
            assert_same_bits(actual, reference.fake_quant_backward(grad, x, *grid))


def test_float64_is_rounded_to_float32_first():
    tie = torch.tensor([2.5 + 1e-9, 3.5 - 1e-9], dtype=torch.float64)
    assert fake_quant(tie, torch.tensor(1.0)).tolist() == [2.0, 4.0]


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_any_number_of_threads_gives_the_same_bits(threads):
    x, grad = torch.randn(3, 70001), torch.randn(3, 70001)
    scale, before = torch.rand(3) + 0.01, torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for grid in ((scale[:1], -128, 127, None), (scale, -8, 7, 0)):
            assert_same_bits(cpu.fake_quant(x, *grid), reference.fake_quant(x, *grid))
            actual = cpu.fake_quant_backward(grad, x, *grid)
            assert_same_bits(actual, reference.fake_quant_backward(grad, x, *grid))
    finally:
        torch.set_num_threads(before)


@functools.cache
def onnx_session(code_type, axis):
    """Return an ONNX model that quantizes x and dequantizes it again."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["code"], axis=axis),
        helper.make_node("DequantizeLinear", ["code", "scale", "zero"], ["y"], axis=axis),
    ]
    inputs = [("x", TensorProto.FLOAT), ("scale", TensorProto.FLOAT), ("zero", code_type)]
    graph = helper.make_graph(
        nodes,
        "fake_quant",
        [helper.make_tensor_value_info(name, kind, None) for name, kind in inputs],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )
    opset = helper.make_opsetid("", 21)  # the first one with 16-bit codes
    model = helper.make_model(graph, opset_imports=[opset], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options)


def onnx_fake_quant(x, scale, bits=8, axis=1, zero_point=0):
    kind, code = {8: (TensorProto.INT8, np.int8), 16: (TensorProto.INT16, np.int16)}[bits]
    feed = {"x": x.numpy(), "scale": scale.numpy(), "zero": np.full(scale.shape, zero_point, code)}
    return torch.from_numpy(onnx_session(kind, axis).run(["y"], feed)[0])


@pytest.mark.parametrize("bits", [8, 16])
def test_a_million_values_equal_onnx_runtime(bits):
    qmax = integer_range(bits)[1]
    for scale in (1.0, 0.1, 1 / 3, 0.0078431, 6.02 / 127, 1e-5, 77.7, 3e4):
        x = values_near_ties(125_000, scale, qmax)
        scale = torch.tensor(scale)
        expected = onnx_fake_quant(x, scale, bits)
        assert_same_bits(fake_quant(x, scale, bits), expected)
        assert_same_bits(reference.fake_quant(x, scale, *integer_range(bits), None), expected)


@pytest.mark.parametrize(("bits", "zero_point"), [(8, -128), (8, 37), (8, 127), (16, -32768)])
def test_grids_with_a_zero_point_equal_onnx_runtime(bits, zero_point):
    for scale in (0.1, 6.02 / 255, 3e4):
        x = values_near_ties(125_000, scale, 2**bits - 1)
        scale = torch.tensor(scale)
        expected = onnx_fake_quant(x, scale, bits, zero_point=zero_point)
        assert_same_bits(fake_quant(x, scale, bits, zero_point=zero_point), expected)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_channels_equal_onnx_runtime(axis):
    x = torch.randn(5, 67, 9) * 3
    scale = torch.rand(x.shape[axis]) * 0.05 + 0.001
    assert_same_bits(fake_quant(x, scale, axis=axis), onnx_fake_quant(x, scale, axis=axis))


def test_codes_round_halves_to_even():
    x = torch.tensor([-3, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3])
    y = fake_quant(x, torch.tensor(1.0), bits=3)
    assert_same_bits(y, torch.tensor([-3.0, -2, -2, 0, 0, 2, 2, 3]))


@pytest.mark.parametrize(("narrow", "lowest"), [(False, -4.0), (True, -3.0)])
def test_codes_are_clipped(narrow, lowest):
    y = fake_quant(torch.tensor([-9.0, 9.0]), torch.tensor(1.0), bits=3, narrow=narrow)
    assert y.tolist() == [lowest, 3.0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinity_saturates_and_nan_stays(dtype):
    x = torch.tensor([torch.inf, -torch.inf, torch.nan], dtype=dtype)
    y = fake_quant(x, torch.tensor(0.5))
    assert_same_bits(y, torch.tensor([63.5, -64.0, torch.nan], dtype=dtype))
    assert slope(x, torch.tensor(0.5)).tolist() == [0.0, 0.0, 0.0]


def test_the_gradient_stops_where_the_code_is_clipped():
    # halves go to the even code: 7.5 to 8, which is clipped, and -8.5 to -8, which is not
    x = torch.tensor([7.0, 7.49, 7.5, 9.0, -8.0, -8.5, -8.51, 0.0], requires_grad=True)
    upstream = torch.tensor([1.5, -2.0, 3.0, 4.0, 5.0, 0.1, 7.0, -0.0])
    fake_quant(x, torch.tensor(1.0), bits=4).backward(upstream)
    assert_same_bits(x.grad, torch.tensor([1.5, -2.0, 0, 0, 5.0, 0.1, 0, -0.0]))


def test_the_scale_gets_no_gradient():
    x, scale = torch.randn(7, requires_grad=True), torch.tensor(0.1, requires_grad=True)
    fake_quant(x, scale).sum().backward()
    assert scale.grad is None
    assert x.grad.tolist() == [1.0] * 7


def test_a_second_derivative_is_refused():
    x = torch.randn(7, requires_grad=True)
    (grad,) = torch.autograd.grad(
        fake_quant(x, torch.tensor(0.1)).square().sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("shape", [(), (0,), (1,), (1023,), (3, 1025), (0, 3), (2, 1, 3, 5)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_shape(shape, dtype):
    x, scale = torch.randn(shape).to(dtype), torch.tensor(0.03)
    assert_same_bits(fake_quant(x, scale), reference.fake_quant(x, scale, -128, 127, None))
    expected = reference.fake_quant_backward(torch.ones_like(x), x, scale, -128, 127, None)
    assert_same_bits(slope(x, scale), expected)


@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((1,), 0),
        ((1023,), 0),
        ((1023,), -1),
        ((3, 1025), 0),
        ((3, 1025), 1),
        ((1025, 3), -1),
        ((40, 1), 0),
        ((40, 1), 1),
        ((4, 3, 17), 0),
        ((4, 3, 17), 1),
        ((4, 3, 17), -2),
        ((4, 3, 17), 2),
        ((2, 33000), 0),
        ((2, 33000), 1),
        ((0, 3), 1),
        ((0, 3), 0),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_per_channel_is_per_tensor_stacked(shape, axis, dtype):
    x = torch.randn(shape).to(dtype)
    scale = torch.rand(shape[axis]) * 0.3 + 0.01
    y, grad = fake_quant(x, scale, 4, axis=axis), slope(x, scale, 4, axis=axis)
    assert_same_bits(y, reference.fake_quant(x, scale, -8, 7, axis % x.dim()))
    for index in range(min(shape[axis], 50)):
        one = x.select(axis, index).contiguous()
        assert_same_bits(y.select(axis, index), fake_quant(one, scale[index], 4))
        assert_same_bits(grad.select(axis, index), slope(one, scale[index], 4))


STRIDED = {
    "transposed": lambda x: x.t(),
    "every other row": lambda x: x[::2],
    "every other column": lambda x: x[:, ::2],
    "offset": lambda x: x[1:, 3:],
    "expanded": lambda x: x[:1].expand(5, -1),
    "diagonal": lambda x: x.diagonal()[None].expand(5, -1),
    "overlapping": lambda x: x.as_strided((5, 40), (7, 3)),
    "channels last": lambda x: x.reshape(5, 3, 5, -1).to(memory_format=torch.channels_last),
    "negated": lambda x: torch.complex(x, x).conj().imag,
}


@pytest.mark.parametrize("layout", STRIDED)
def test_strided_tensors_are_quantized_like_contiguous_ones(layout):
    x = STRIDED[layout](torch.randn(20, 30))
    grad = STRIDED[layout](torch.randn(20, 30))
    dense = x.clone(memory_format=torch.contiguous_format).resolve_neg()
    for axis in (None, 0, 1):
        scale = torch.rand(1 if axis is None else x.shape[axis]) * 0.1 + 0.01
        strided, contiguous = (a.detach().requires_grad_() for a in (x, dense))
        y, expected = (fake_quant(a, scale, 4, axis=axis) for a in (strided, contiguous))
        assert_same_bits(y, expected)
        y.backward(grad)
        expected.backward(grad.clone(memory_format=torch.contiguous_format))
        assert_same_bits(strided.grad, contiguous.grad)


def tensors(limit=1e6):
    values = st.floats(-limit, limit, width=32)
    return st.lists(values, min_size=1, max_size=60).map(torch.tensor)


scales = st.floats(2.0**-20, 2.0**10, width=32).map(torch.tensor)
widths = st.integers(2, 16)


@properties
@given(tensors(), scales, widths, st.booleans())
def test_property_idempotent(x, scale, bits, narrow):
    once = fake_quant(x, scale, bits, narrow=narrow)
    assert_same_bits(fake_quant(once, scale, bits, narrow=narrow), once)


@properties
@given(tensors(), scales, widths)
def test_property_odd(x, scale, bits):
    y = fake_quant(x, scale, bits, narrow=True)
    assert torch.equal(fake_quant(-x, scale, bits, narrow=True), -y)


@properties
@given(tensors(), scales, widths)
def test_property_monotone(x, scale, bits):
    y = fake_quant(x.sort().values, scale, bits)
    assert (y.diff() >= 0).all()


@properties
@given(tensors(), scales, widths)
def test_property_error_is_half_a_step_at_most(x, scale, bits):
    y = fake_quant(x, scale, bits).double()
    inside = x.abs().double() <= scale.double() * integer_range(bits)[1]
    # two roundings to float32, of the quotient and of the product, on top of the half step
    bound = scale.double() / 2 + x.abs().double() * 2.0**-23
    assert ((x.double() - y).abs() <= bound)[inside].all()


@properties
@given(tensors(), scales, widths)
def test_property_values_are_levels_of_the_grid(x, scale, bits):
    qmin, qmax = integer_range(bits)
    levels = torch.arange(qmin, qmax + 1) * scale
    assert torch.isin(fake_quant(x, scale, bits), levels).all()


@properties
@given(tensors(), scales, widths, st.integers(-20, 20))
def test_property_scaling_by_a_power_of_two(x, scale, bits, exponent):
    factor = 2.0**exponent
    y = fake_quant(torch.where(x.abs() < 1e-20, 0, x), scale, bits)
    assert torch.equal(
        fake_quant(torch.where(x.abs() < 1e-20, 0, x) * factor, scale * factor, bits), y * factor
    )


@properties
@given(tensors(), widths)
def test_property_nothing_clips_at_the_scale_of_the_maximum(x, bits):
    scale = scale_of(x.abs().max(), bits)
    assert slope(x, scale, bits).tolist() == [1.0] * len(x)
    if x.abs().max() > 1e-30:
        code = fake_quant(x, scale, bits).double() / scale.double()
        assert code.abs().max().round() == integer_range(bits)[1]


def test_integer_range():
    assert integer_range(8) == (-128, 127)
    assert integer_range(8, narrow=True) == (-127, 127)
    assert integer_range(2) == (-2, 1)
    assert integer_range(16) == (-32768, 32767)


def test_scale_of_is_the_maximum_over_the_highest_code():
    absmax = torch.tensor([[6.35, 127.0], [0.1, 3e38]])
    scale = scale_of(absmax, 8)
    assert scale.dtype == torch.float32
    assert torch.equal(scale, torch.from_numpy(absmax.numpy() / np.float32(127)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_scale_of_zero_is_one(dtype):
    scale = scale_of(torch.tensor([0.0, 7.0], dtype=dtype), 4)
    assert scale.tolist() == [1.0, 1.0]
    zeros = torch.tensor([0.0, -0.0], dtype=dtype)
    assert_same_bits(fake_quant(zeros, scale[0]), torch.zeros(2, dtype=dtype))


@pytest.mark.parametrize("absmax", [1e-45, 1e-40, 1.2e-38, 1e-36, 1e-300])
@pytest.mark.parametrize("bits", [2, 16])
def test_scale_of_a_tiny_maximum_is_finite_and_positive(absmax, bits):
    absmax = torch.tensor([absmax], dtype=torch.float64)
    scale = scale_of(absmax, bits)
    assert 0 < scale.item() < 1e-30
    assert fake_quant(absmax, scale, bits).isfinite().all()


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 1025), (4, 3, 17), (0,), (0, 3), (3, 0)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_dynamic_grid_is_that_of_the_largest_magnitude(shape, dtype):
    x = (torch.randn(shape) * 5).to(dtype).requires_grad_()
    for axis in (None, *range(-x.dim(), x.dim())):
        rows = x.detach().reshape(1, -1) if axis is None else x.detach().movedim(axis, 0)
        rows = rows.reshape(len(rows), math.prod(rows.shape[1:]))
        largest = torch.tensor([max(row.abs().tolist(), default=0) for row in rows]).to(dtype)
        y = dynamic_fake_quant(x, 4, axis)
        assert_same_bits(y, fake_quant(x, scale_of(largest, 4), 4, axis))
        upstream = torch.randn(shape).to(dtype)
        assert torch.equal(torch.autograd.grad(y, x, upstream)[0], upstream)


@pytest.mark.parametrize("shape", [(), (7,), (3, 1025), (4, 3, 17)])
def test_the_largest_magnitude_gets_the_gradient_of_the_dynamic_step(shape):
    x = (torch.randn(shape) * 5).requires_grad_()
    upstream = torch.randn(shape)
    for axis in (None, *range(-x.dim(), x.dim())):
        y = dynamic_fake_quant(x, 4, axis, range_gradient=True)
        assert torch.equal(y, dynamic_fake_quant(x, 4, axis))
        exact = x.detach().double().requires_grad_()
        others = [d for d in range(x.dim()) if axis is not None and d != axis % x.dim()]
        over = others or (() if axis is not None else None)
        step = (exact.abs() if over == () else exact.abs().amax(over, keepdim=True)) / 7
        rest = ((y.double() - exact) / step).detach()
        (expected,) = torch.autograd.grad(exact + rest * step, exact, upstream.double())
        (actual,) = torch.autograd.grad(y, x, upstream)
        torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gradient_of_the_range_is_of_the_type_of_what_is_rounded(dtype):
    x = torch.tensor([[0.7, -8.0], [0.0, 0.0]], dtype=dtype, requires_grad=True)
    y = dynamic_fake_quant(x, 4, 0, range_gradient=True)
    (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
    step = 8 / 7
    error = y[0, 0].item() - x[0, 0].item()
    assert y[0, 0].item() == pytest.approx(step, rel=1e-2)
    assert gradient.dtype == dtype
    assert gradient[0].tolist() == pytest.approx([1, 1 - error / 8], rel=1e-2)
    assert gradient[1].tolist() == [1, 1]  # a range of zeros has no slope
    assert dynamic_fake_quant(x[:, :0], 4, range_gradient=True).shape == (2, 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(70_001,), (3, 1025), (33, 2, 40), (2, 3, 5, 7), (1, 40_000, 2)])
def test_dynamic_kernels_agree(shape, dtype):
    x = (torch.randn(shape) * torch.randn(shape).exp()).to(dtype)
    for special in (None, torch.nan, -torch.inf, 0.0):
        if special is not None:
            x.view(-1)[x.numel() // 2] = special
        if special == 0.0:
            x[...] = 0.0
        for axis in (None, *range(x.dim())):
            for bits in (2, 8):
                expected = reference.dynamic_fake_quant(x, *integer_range(bits), axis)
                actual = cpu.dynamic_fake_quant(x, *integer_range(bits), axis)
                assert_same_bits(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(70_001,), (3, 1025), (33, 2, 40), (1, 40_000, 2), (600, 300)])
def test_kernels_of_gradients_of_ranges_agree(shape, dtype):
    x = (torch.randn(shape) * torch.randn(shape).exp()).to(dtype)
    grad = torch.randn(shape).to(dtype)
    wide = grad.double() if dtype == torch.float64 else grad.float()
    for axis in (None, *range(x.dim())):
        scale = torch.rand(() if axis is None else x.shape[axis]) * 0.05 + 0.01
        grid = *integer_range(8), axis
        ours = cpu.learned_fake_quant_backward(grad, x, scale, *grid)
        theirs = reference.learned_fake_quant_backward(wide, x, scale, *grid)
        assert_same_bits(ours[0], theirs[0].to(dtype))
        torch.testing.assert_close(ours[1], theirs[1], rtol=1e-4, atol=1e-3)
        followed = cpu.dynamic_fake_quant_backward(grad, x, *grid)
        expected = reference.dynamic_fake_quant_backward(wide, x, *grid).to(dtype)
        changed = followed != grad
        assert torch.equal(changed, expected != grad)
        assert changed.sum() <= scale.numel()  # in 16 bits some are too small to change it
        torch.testing.assert_close(
            followed, expected, rtol=max(1e-4, 2 * torch.finfo(dtype).eps), atol=1e-4
        )


def test_gradients_of_ranges_do_not_depend_on_threads():
    x, grad = torch.randn(3, 100_001), torch.randn(3, 100_001)
    results = []
    for threads in (1, 2, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        for axis in (None, 0, 1):
            results.append(cpu.dynamic_fake_quant_backward(grad, x, -128, 127, axis))
        torch.set_num_threads(before)
    for axis in range(3):
        assert all(torch.equal(results[axis], other) for other in results[axis::3])


@pytest.mark.parametrize("dtype", DTYPES)
def test_dynamic_kernels_see_the_end_of_long_tensors(dtype):
    x = torch.randn(5 * 2**15 + 7).to(dtype)
    for position in (0, 2**17, len(x) - 1):
        x[position] = 20 + position // 2**15
        expected = reference.dynamic_fake_quant(x, -128, 127, None)
        assert_same_bits(cpu.dynamic_fake_quant(x, -128, 127, None), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dynamic_kernels_of_the_smallest_floats(dtype):
    x = (torch.randn(50, dtype=torch.float64) * 1e-41).to(dtype)
    for axis in (None, 0):
        actual = cpu.dynamic_fake_quant(x, -128, 127, axis)
        assert actual.isfinite().all()
        assert_same_bits(actual, reference.dynamic_fake_quant(x, -128, 127, axis))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_rounding_in_place(dtype, axis):
    whole = torch.randn(33, 50).to(dtype)
    scale = torch.tensor(0.03) if axis is None else torch.rand(whole.shape[axis]) + 0.01
    expected = fake_quant(whole, scale, 6, axis)
    for x in (
        whole.clone(),
        whole.clone().t().contiguous().t(),
        whole.clone().repeat(1, 2)[:, :50],
    ):
        assert quanttune.fake_quant_(x, scale, 6, axis) is x
        assert_same_bits(x, expected)


def test_rounding_in_place_is_seen_by_autograd():
    x = torch.randn(5)
    weight = torch.randn(5, requires_grad=True)
    product = weight * x
    quanttune.fake_quant_(x, torch.tensor(0.1))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()
    with pytest.raises(RuntimeError, match=r"requires a gradient: use fake_quant"):
        quanttune.fake_quant_(weight, torch.tensor(0.1))
    with torch.no_grad():
        quanttune.fake_quant_(weight, torch.tensor(0.1))
    assert torch.equal(weight, fake_quant(weight, torch.tensor(0.1)))
    with torch.inference_mode():
        quanttune.fake_quant_(torch.randn(5), torch.tensor(0.1))


def test_the_largest_magnitude_may_be_negative():
    x = torch.tensor([[1.0, -7.0], [2.0, 3.0]])
    assert absmax(x).item() == 7.0
    assert absmax(x, 1).tolist() == [2.0, 7.0]
    assert absmax(x, 0).tolist() == [7.0, 3.0]
    assert absmax(torch.tensor([-1.0, torch.nan])).isnan()


@pytest.mark.parametrize(
    ("x", "axis", "error", "message"),
    [
        (torch.arange(3), None, TypeError, "got a tensor of torch.int64"),
        (torch.ones(2, 3), 2, ValueError, "dimension of x, which has 2, got 2"),
        (torch.tensor(1.0), 0, ValueError, "dimension of x, which has 0, got 0"),
    ],
)
def test_mistakes_with_the_dynamic_grid_are_named(x, axis, error, message):
    with pytest.raises(error, match=message):
        dynamic_fake_quant(x, axis=axis)
    with pytest.raises(ValueError, match="bits must be from 2 to 16, got 1"):
        dynamic_fake_quant(torch.ones(3), bits=1)


@pytest.mark.parametrize("bits", [1, 17, 0, -8])
def test_bits_out_of_range(bits):
    message = f"bits must be from 2 to 16, got {bits}"
    with pytest.raises(ValueError, match=message):
        fake_quant(torch.randn(3), torch.tensor(1.0), bits=bits)
    with pytest.raises(ValueError, match=message):
        scale_of(torch.tensor(1.0), bits)


ONE = torch.tensor(1.0)
MISTAKES = [
    ([1.0], ONE, None, TypeError, "x must be a floating-point tensor, got list"),
    (
        torch.arange(3),
        ONE,
        None,
        TypeError,
        "x must be a floating-point tensor, got a tensor of torch.int64",
    ),
    (
        torch.ones(3),
        ONE.double(),
        None,
        TypeError,
        "scale must be a float32 tensor, got a tensor of torch.float64",
    ),
    (torch.ones(3), 0.1, None, TypeError, "scale must be a float32 tensor, got float"),
    (torch.ones(3), 0 * ONE, None, ValueError, "scale must be finite and positive, got 0"),
    (torch.ones(3), -ONE, None, ValueError, "scale must be finite and positive, got -1"),
    (torch.ones(3), ONE / 0, None, ValueError, "scale must be finite and positive, got inf"),
    (torch.ones(3), 0 * ONE / 0, None, ValueError, "scale must be finite and positive, got nan"),
    (
        torch.ones(3),
        ONE.int(),
        None,
        TypeError,
        "scale must be a float32 tensor, got a tensor of torch.int32",
    ),
    (torch.ones(3), ONE.to("meta"), None, ValueError, "on the device of x, cpu, got meta"),
    (torch.ones(3), torch.ones(3), None, ValueError, r"must hold 1 value\(s\), got shape \(3,\)"),
    (torch.ones(2, 3), torch.ones(2), 1, ValueError, r"must hold 3 value\(s\), got shape \(2,\)"),
    (torch.ones(2, 3), torch.ones(0), 0, ValueError, r"must hold 2 value\(s\), got shape \(0,\)"),
    (torch.ones(2, 3), torch.ones(2), 2, ValueError, "dimension of x, which has 2, got 2"),
    (torch.ones(2, 3), torch.ones(2), -3, ValueError, "dimension of x, which has 2, got -3"),
    (torch.tensor(1.0), ONE, 0, ValueError, "dimension of x, which has 0, got 0"),
]


@pytest.mark.parametrize(("x", "scale", "axis", "error", "message"), MISTAKES)
def test_mistakes_are_named(x, scale, axis, error, message):
    with pytest.raises(error, match=message):
        fake_quant(x, scale, axis=axis)
