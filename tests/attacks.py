"""Cases that nobody wrote down: tensors for every op.

Each attack is a function that draws one case and raises if the answer is wrong. test_attacks.py
draws a few of each, the same ones every time; `make attack` draws others for as long as it may.
"""

import numpy as np
import torch
from hypothesis import strategies as st

from quanttune import ops, reference
from quanttune.reference import range_search
from quanttune.reference.outlier_statistics import DEVIATION, MAXIMUM, MEAN, MEDIAN, RATIO

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
SINGLE = 2.0**-24
EXACT = [MAXIMUM, MEDIAN, 5, 6]

KINDS = {
    "normal": lambda x: x,
    "heavy tailed": lambda x: x * (2 * x).exp(),
    "rectified": lambda x: x.relu(),
    "shifted": lambda x: x / 50 + 3,
    "constant": lambda x: torch.full_like(x, 1.37),
    "zeros": torch.zeros_like,
    "on a grid": lambda x: (4 * x).round() / 4,
    "one outlier": lambda x: x.flatten().index_fill(0, torch.tensor(0), 900.0).view_as(x),
}
LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "every second": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "one behind a border": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "expanded": lambda x: x[:1].expand(x.shape),
    "backwards in memory": lambda x: x.flip(0).contiguous().flip(0),
}
SHAPES = st.one_of(
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
    st.tuples(st.integers(1, 4), st.integers(1, 300)),
    st.sampled_from([(1, 16384), (2, 16385), (3, 32769), (1, 131073), (2, 65537), (1, 140001)]),
)


def draw_tensor(data, dtypes=DTYPES):
    """Return a tensor of any shape, layout, type and kind of values."""
    torch.manual_seed(data.draw(st.integers(0, 2**31), label="seed"))
    shape = data.draw(SHAPES, label="shape")
    kind = data.draw(st.sampled_from(sorted(KINDS)), label="kind")
    unit = 10.0 ** data.draw(st.integers(-6, 1), label="unit")
    dtype = data.draw(st.sampled_from(dtypes), label="dtype")
    layout = data.draw(st.sampled_from(sorted(LAYOUTS)), label="layout")
    x = (KINDS[kind](torch.randn(shape)) * unit).clamp(-60000, 60000)  # what float16 holds
    return LAYOUTS[layout](x.to(dtype))


def draw_grid(data, x):
    """Return steps for x, bounds and the axis of the steps."""
    bits = data.draw(st.integers(2, 16), label="bits")
    axis = data.draw(st.one_of(st.none(), st.integers(0, x.dim() - 1)), label="axis")
    absmax = reference.absmax(x.float(), axis).reshape(-1)
    part = data.draw(st.sampled_from([1.0, 0.3, 7.0]), label="part of the range")
    high = 2 ** (bits - 1) - 1
    steps = torch.where(absmax == 0, 1.0, (absmax * part / high).clamp(min=1e-30))
    zero_point = data.draw(st.integers(-high - 1, high), label="zero point")
    return steps, -high - 1 - zero_point, high - zero_point, axis


def same(actual, expected):
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def rounded_by_numpy(x, steps, low, high, axis):
    shape = [-1 if dim == axis else 1 for dim in range(x.dim())] if axis is not None else []
    steps = steps.numpy().reshape(shape)
    with np.errstate(invalid="ignore"):  # inf / inf
        codes = np.clip(np.rint(x.float().numpy() / steps), low, high)
        return torch.from_numpy(np.asarray(codes * steps, np.float32)).to(x.dtype), codes


def attack_fake_quant(data):
    x = draw_tensor(data)
    grid = draw_grid(data, x)
    expected, _ = rounded_by_numpy(x, *grid)
    same(ops.fake_quant(x, *grid), expected + 0.0)
    same(reference.fake_quant(x, *grid), expected + 0.0)


def attack_fake_quant_backward(data):
    x = draw_tensor(data)
    steps, low, high, axis = draw_grid(data, x)
    grad = torch.randn(x.shape).to(x.dtype)
    _, codes = rounded_by_numpy(x, steps, low - 1, high + 1, axis)
    inside = torch.from_numpy(np.asarray((codes >= low) & (codes <= high)))
    expected = torch.where(inside.reshape(x.shape), grad, 0)
    same(ops.fake_quant_backward(grad, x, steps, low, high, axis), expected)


def attack_dynamic_fake_quant(data):
    x = draw_tensor(data)
    bits = data.draw(st.integers(2, 16), label="bits")
    axis = data.draw(st.one_of(st.none(), st.integers(0, x.dim() - 1)), label="axis")
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    others = tuple(dim for dim in range(x.dim()) if axis is not None and dim != axis)
    wide = x.float().abs().numpy()
    absmax = wide.max() if axis is None else wide.max(axis=others) if others else wide
    tiny = np.finfo(np.float32).tiny
    steps = np.where(absmax == 0, 1, np.maximum(np.float32(absmax) / np.float32(high), tiny))
    steps = torch.from_numpy(np.asarray(steps, np.float32)).reshape(-1)
    expected, _ = rounded_by_numpy(x, steps, low, high, axis)
    same(ops.dynamic_fake_quant(x, low, high, axis), expected + 0.0)


def slopes_by_numpy(grad, x, grid):
    """Return what each scale gets, in float64, and how far it may be from that."""
    steps, low, high, axis = grid
    quotients = (x.float() / as_wide_as(x, steps, axis)).double()
    codes = quotients.round()
    clipped = codes.clamp(low, high)
    inside = codes == clipped
    terms = grad.double() * torch.where(inside, codes - quotients, clipped)
    error = 1e-6 * terms.abs() + SINGLE * (grad.double() * quotients).abs() * inside
    return rows_of(terms, axis).sum(1), rows_of(error, axis).sum(1)


def as_wide_as(x, steps, axis):
    return steps.reshape([-1 if dim == axis else 1 for dim in range(x.dim())])


def rows_of(x, axis):
    """Return what each grid is of."""
    return x.reshape(1, -1) if axis is None else x.movedim(axis, 0).reshape(x.shape[axis], -1)


def attack_learned_fake_quant_backward(data):
    x = draw_tensor(data)
    grid = draw_grid(data, x)
    grad = torch.randn(x.shape).to(x.dtype)
    grad_x, slopes = ops.learned_fake_quant_backward(grad, x, *grid)
    same(grad_x, ops.fake_quant_backward(grad, x, *grid))
    expected, error = slopes_by_numpy(grad, x, grid)
    assert ((slopes.double() - expected).abs() <= error).all()


def attack_dynamic_fake_quant_backward(data):
    """The largest magnitude, the first of equal ones, gets what its step does."""
    x = draw_tensor(data)
    bits = data.draw(st.integers(2, 16), label="bits")
    axis = data.draw(st.one_of(st.none(), st.integers(0, x.dim() - 1)), label="axis")
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    grad = torch.randn(x.shape).to(x.dtype)
    actual = rows_of(ops.dynamic_fake_quant_backward(grad, x, low, high, axis), axis).double()
    steps = reference.scale_of(reference.absmax(x.float(), axis).reshape(-1), high)
    slopes, error = slopes_by_numpy(grad, x, (steps, low, high, axis))
    places = rows_of(x, axis).abs().argmax(1, keepdim=True)
    largest = rows_of(x, axis).double().gather(1, places)[:, 0]
    part = torch.where(largest == 0, 0, steps.double() / largest)
    expected = rows_of(grad, axis).double()
    there = expected.gather(1, places)[:, 0] + slopes * part
    kind = torch.finfo(x.dtype)
    rounding = kind.eps * (there.abs() + (slopes * part).abs() + kind.smallest_normal)
    assert ((actual.gather(1, places)[:, 0] - there).abs() <= error * part.abs() + rounding).all()
    same(actual.scatter(1, places, 0), expected.scatter(1, places, 0))


def draw_rows(data):
    x = draw_tensor(data)
    samples = data.draw(st.sampled_from([1, x.shape[0]]), label="samples")
    return x, samples, data.draw(st.booleans(), label="exact")


def attack_outlier_statistics(data):
    x, samples, exact = draw_rows(data)
    actual = ops.outlier_statistics(x, samples, exact).double()
    same(actual[:, EXACT], reference.outlier_statistics(x, samples, exact).double()[:, EXACT])
    rows = x.reshape(samples, -1).double()
    mean = rows.mean(1)
    centered = rows - mean[:, None]
    deviation = (centered.square().sum(1) / max(rows.shape[1] - 1, 1)).sqrt()
    constant = (rows == rows[:, :1]).all(1)
    deviation[constant] = 0
    shift = torch.where(deviation == 0, 0, mean.abs() / deviation)
    gate = 20 * SINGLE + (8 * SINGLE * shift).square()
    assert ((actual[:, DEVIATION] - deviation).abs() <= gate * deviation).all()
    assert ((actual[:, MEAN] - mean).abs() <= gate * torch.maximum(mean.abs(), deviation)).all()
    spread = actual[:, MAXIMUM] - actual[:, MEDIAN]
    ratio = torch.where(constant, 0, spread / torch.where(constant, 1, deviation))
    assert ((actual[:, RATIO] - ratio).abs() <= gate * ratio + 4 * SINGLE * ratio).all()


def attack_outlier_statistics_backward(data):
    x, samples, exact = draw_rows(data)
    detach = data.draw(st.booleans(), label="detach_deviation")
    statistics = ops.outlier_statistics(x, samples, exact)
    grad = torch.zeros(x.shape, dtype=x.dtype)
    weight = torch.randn(samples, dtype=statistics.dtype)
    actual = ops.outlier_statistics_backward(grad, x, statistics, weight, exact, detach).double()
    wide = x.double(), statistics.double(), weight.double(), exact, detach
    truth = reference.outlier_statistics_backward(grad.double(), *wide).reshape(samples, -1)
    terms = terms_of(x.reshape(samples, -1).double(), statistics.double(), weight.double())
    kind = torch.finfo(x.dtype)
    error = 4e-6 * terms + kind.eps * truth.abs() + kind.smallest_normal * kind.eps
    held = truth.abs() < kind.max / 2
    assert (((actual.reshape(samples, -1) - truth).abs() <= error) | ~held).all()


def terms_of(rows, statistics, weight):
    """Return how large the terms of a gradient are, which may cancel, where it has some."""
    column = statistics[:, :, None].unbind(1)
    unit = weight.abs()[:, None] / column[DEVIATION].clamp(min=1e-30)
    reach = (rows - column[MEAN]).abs() + column[MEAN].abs()
    terms = (
        unit
        * column[RATIO]
        * reach
        / column[DEVIATION].clamp(min=1e-30)
        / max(rows.shape[1] - 1, 1)
    )
    at_either = (rows.abs() == column[MAXIMUM]) | (rows.abs() == column[MEDIAN])
    return terms + unit * at_either


def attack_quantization_errors(data):
    x = draw_tensor(data)
    bits = data.draw(st.integers(2, 9), label="bits")
    parts = data.draw(st.lists(st.floats(0.01, 3), min_size=1, max_size=5), label="parts")
    absmax = x.abs().max().float()
    high = 2 ** (bits - 1) - 1
    steps = torch.tensor(parts) * torch.where(absmax == 0, 1, absmax).clamp(min=1e-20) / high
    values = x.float().numpy().reshape(-1)
    expected = []
    for step in steps.numpy():
        codes = np.clip(np.rint(values / step), -high - 1, high).astype(np.float64)
        expected.append(np.square(values.astype(np.float64) - codes * np.float64(step)).sum())
    actual = ops.quantization_errors(x, steps, -high - 1, high)
    torch.testing.assert_close(actual, torch.tensor(expected), rtol=1e-9, atol=0)


def attack_magnitude_histogram(data):
    x = draw_tensor(data)
    bins = data.draw(st.integers(1, 4096), label="bins")
    absmax = float(x.abs().max()) or 1.0
    width = float(np.float32(absmax * data.draw(st.floats(0.2, 2), label="part") / bins))
    actual = ops.magnitude_histogram(x, width, bins)
    same(actual, range_search.magnitude_histogram(x, width, bins))
    assert int(actual.sum()) == x.numel()


def attacks_in(module):
    """Return the attacks of a file, by name."""
    return {n.removeprefix("attack_"): f for n, f in module.items() if n.startswith("attack_")}


IN_MEMORY = attacks_in(globals())
