"""The C++ kernels as a whole: threads, forks, memory, huge sizes, and every instruction set."""

import ctypes
import functools
import importlib.machinery
import importlib.util
import math
import mmap
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from memory import SANITIZED, growth, linux_memory
from scripts import run
from test_outlier_statistics import (
    DTYPES,
    EXACT_COLUMNS,
    adversarial_rows,
    assert_same_bits,
    extended_statistics,
    gates,
    hashed_position,
    result_dtype,
    statistics,
)

from quanttune import cpu, fake_quant, fused_observer, reference
from quanttune.reference import (
    DEVIATION,
    MAXIMUM,
    MAXIMUM_COUNT,
    MEAN,
    MEDIAN,
    MEDIAN_COUNT,
    RATIO,
    sample_positions,
)

ROOT = Path(__file__).resolve().parent.parent


def test_the_sanitized_build_is_what_a_sanitizer_sees():
    assert ("sanitize" in Path(cpu._C.__file__).parts) == SANITIZED


def every_op(x, rows):
    """Return what each kernel makes of x: statistics, codes, their gradients, what grids lose."""
    kind = result_dtype(x.dtype)
    columns = cpu.outlier_statistics(x, rows, False)
    ratio_grad = torch.linspace(-2, 3, rows).to(kind)
    grad = x.flip(-1)
    added = cpu.outlier_statistics_backward(grad, x, columns, ratio_grad, False, False)
    whole = torch.tensor([0.037]), -8, 7, None
    channels = torch.linspace(0.01, 0.2, x.shape[-1]), -128, 127, x.dim() - 1
    quantized = [cpu.fake_quant(x, *grid) for grid in (whole, channels)]
    passed = [cpu.fake_quant_backward(grad, x, *grid) for grid in (whole, channels)]
    dynamic = [cpu.dynamic_fake_quant(x, -128, 127, axis) for axis in (None, 0, x.dim() - 1)]
    searched = [
        cpu.quantization_errors(x, torch.tensor([0.01, 0.2]), -128, 127),
        cpu.magnitude_histogram(x, 0.01, 500),
    ]
    return [columns, added, *quantized, *passed, *dynamic, *searched]


# ------------------------------------------------------------------------------ threads and forks


@pytest.mark.parametrize(
    ("shape", "dtype", "repeats"),
    [((3, 33343), dtype, 30) for dtype in DTYPES]
    + [((1, 1000003), torch.float32, 10), ((7, 40961), torch.bfloat16, 15)]
    + [((1, 32767), torch.float32, 30), ((1, 32769), torch.float32, 30)],
)
def test_any_number_of_threads_gives_the_same_bits_every_time(shape, dtype, repeats, with_threads):
    x = torch.randn(shape).to(dtype)
    with_threads(1)
    expected = every_op(x, len(x))
    for count in (1, 2, 4):
        with_threads(count)
        for _ in range(repeats if not SANITIZED else 3):
            for actual, wanted in zip(every_op(x, len(x)), expected, strict=True):
                assert_same_bits(actual, wanted)


FORKS = """
import os, signal, torch, quanttune
ops = torch.ops.quanttune

def work():
    # ops of ours alone: the threads of PyTorch's are just as dead in a forked child
    columns = ops.outlier_statistics(x, 4, False)
    grad = ops.outlier_statistics_backward(x, x, columns, torch.ones(4), False, False)
    y = ops.fake_quant(x, step, -8, 7, None)
    passed = ops.fake_quant_backward(x, x, step, -8, 7, None)
    return [tensor.numpy().tobytes() for tensor in (columns, grad, y, passed)]

torch.set_num_threads(2)
x, step = torch.linspace(-3, 3, 400_000).reshape(4, -1), torch.tensor(0.1)
expected = work()
for _ in range(20):
    assert work() == expected
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # ends a child that hangs
        os._exit(0 if torch.get_num_threads() == 2 and work() == expected else 1)
    print(os.waitpid(child, 0)[1])
print(work() == expected)
"""

WORKERS = """
import torch, quanttune
from torch.utils.data import DataLoader, Dataset

class Examples(Dataset):
    # made before the fork, since PyTorch's own threads do not survive it
    data = [torch.linspace(-1, 1 + index, 70_001).repeat(2, 1) for index in range(8)]

    def __len__(self):
        return 8

    def __getitem__(self, index):
        x = self.data[index]
        y = quanttune.fake_quant(x, torch.tensor(0.25))
        return y[:, ::1000].clone(), quanttune.fused_observer.outlier_ratio(x)

def same(loader):
    return all(torch.equal(a, b) for batch, wanted in zip(loader, expected, strict=True)
               for a, b in zip(batch, wanted, strict=True))

torch.set_num_threads(2)
expected = list(DataLoader(Examples(), batch_size=2))
for first in (lambda _: None, lambda _: torch.set_num_threads(2)):
    loader = DataLoader(Examples(), batch_size=2, num_workers=2, timeout=60,
                        multiprocessing_context="fork", worker_init_fn=first)
    print(same(loader), same(loader))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
def test_twenty_forks_after_parallel_use(tmp_path):
    assert run(FORKS, tmp_path) == ["0"] * 20 + ["True"]


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
def test_the_workers_of_a_data_loader(tmp_path):
    assert run(WORKERS, tmp_path) == ["True True"] * 2


# ----------------------------------------------------------------------- more than 2^31 elements

TILE = 1 << 22  # bytes of memory that a huge tensor repeats
WIDTH = TILE // 2  # in 16-bit elements


def huge(tiles, tail):
    """Return a bfloat16 tensor of a few GiB, the one tile that it repeats, and the tail behind it.

    All copies of the tile are the same memory, so what is written there lies on top of each other.
    """
    size, flags = tiles * TILE + 2 * tail, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    try:  # addresses alone: no memory is behind them
        reserved = mmap.mmap(-1, size, flags | getattr(mmap, "MAP_NORESERVE", 0x4000))
    except OSError as error:
        pytest.skip(f"this machine reserves no {size >> 30} GiB of addresses: {error}")
    whole = torch.frombuffer(reserved, dtype=torch.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    fixed = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0x8000) | 0x10  # MAP_FIXED
    file = os.memfd_create("tile")
    os.truncate(file, TILE + 2 * tail)
    for offset in range(0, size, TILE):
        length, source = min(TILE, size - offset), TILE if offset == tiles * TILE else 0
        address = whole.data_ptr() + offset
        mapped = libc.mmap(address, length, mmap.PROT_READ | mmap.PROT_WRITE, fixed, file, source)
        assert mapped == address, os.strerror(ctypes.get_errno())
    os.close(file)
    x = whole.view(torch.bfloat16)
    return x, x[:WIDTH], x[tiles * WIDTH :]


def fill(tile, tail):
    """Write small integers, and the two largest magnitudes at the tail's two ends."""
    tile.copy_(torch.randint(-8, 10, tile.shape))
    tail.copy_(torch.randint(-8, 10, tail.shape))
    tail[0], tail[-1] = -96, 96


def row_by_hand(tiles, tile, tail):
    """Return the columns of a huge row of integers, and its sampled positions."""
    start = tiles * len(tile)
    size = start + len(tail)
    ones, twos = tile.long(), tail.long()
    total = tiles * int(ones.sum()) + int(twos.sum())
    squares = tiles * int(ones.square().sum()) + int(twos.square().sum())
    deviation = math.sqrt((squares - Fraction(total * total, size)) / (size - 1))
    stride = math.ceil(Fraction(size, 65536))
    positions = torch.tensor([hashed_position(i, stride) for i in range(size // stride)])
    inside = positions < start
    sampled = torch.cat([ones[positions[inside] % len(tile)], twos[positions[~inside] - start]])
    magnitudes = sorted(map(abs, sampled.tolist()))
    median = magnitudes[(len(magnitudes) - 1) // 2]
    columns = [96, median, total / size, deviation, (96 - median) / deviation, 2]
    return [*columns, magnitudes.count(median)], positions


@linux_memory
def test_statistics_of_a_row_of_billions():
    tiles = 2048  # 2^32 elements and more
    x, tile, tail = huge(tiles, 1_000_003)
    fill(tile, tail)
    expected, positions = row_by_hand(tiles, tile, tail)
    assert positions[-1] > 2**32
    (columns,) = statistics(x[None]).tolist()
    for column in EXACT_COLUMNS:
        assert columns[column] == expected[column]
    gate, ratio_gate = gates(x.dtype, expected[MEAN], expected[DEVIATION])
    for column, allowed in ((MEAN, gate), (DEVIATION, gate), (RATIO, ratio_gate)):
        assert abs(columns[column] - expected[column]) <= allowed * abs(expected[column])


@linux_memory
def test_statistics_of_rows_beyond_two_to_the_31():
    x, tile, tail = huge(1024, WIDTH)
    fill(tile, tail)
    columns = statistics(x.view(1025, WIDTH))
    assert_same_bits(columns[:1024], statistics(tile[None]).expand(1024, -1))
    assert_same_bits(columns[1024:], statistics(tail[None]))
    assert columns[1024, MAXIMUM] == 96


@linux_memory
def test_the_gradient_of_a_row_of_billions(monkeypatch):
    (x, tile, tail), (result, _, written) = huge(1024, 1_000_003), huge(1024, 1_000_003)
    upstream, _, _ = huge(1024, 1_000_003)  # of zeros
    fill(tile, tail)
    columns, positions = row_by_hand(1024, tile, tail)
    arguments = torch.tensor([columns]), torch.tensor([1e10]), False, False
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty_like", lambda _: result[None])
        cpu.outlier_statistics_backward(upstream[None], x[None], *arguments)
    unit, freedom, values = 1e10 / columns[DEVIATION], x.numel() - 1, tail.double()
    slope = -unit * columns[RATIO] / columns[DEVIATION] / freedom
    expected = slope * (values - columns[MEAN])
    expected[[0, -1]] += torch.tensor([-unit, unit], dtype=torch.float64) / 2
    sampled = positions[positions >= 1024 * WIDTH] - 1024 * WIDTH
    moved = sampled[values[sampled].abs() == columns[MEDIAN]]
    assert len(moved) > 0
    expected[moved] -= values[moved].sign() * unit / columns[MEDIAN_COUNT]
    error = (written.double() - expected).abs() / expected.abs()
    assert error.max() <= 4e-6 + 2.0**-8  # the gate of a gradient, and the rounding to bfloat16


@linux_memory
@pytest.mark.parametrize(("name", "axis"), [("fake_quant", None), ("fake_quant_backward", 0)])
def test_fake_quant_beyond_two_to_the_31(name, axis, monkeypatch):
    (x, *parts), (y, *results) = huge(1024, WIDTH), huge(1024, WIDTH)
    fill(*parts)
    scale = torch.rand({None: 1, 0: 1025, 1: WIDTH}[axis]) + 0.2
    if axis == 0:
        scale[:-1] = scale[0]  # of all copies of the tile
    ends = (scale[:1], scale[-1:]) if axis == 0 else (scale, scale)
    x, y = x.view(1025, WIDTH), y.view(1025, WIDTH)
    kernel, tensors = getattr(cpu, name), 2 if name.endswith("backward") else 1
    expected = [
        kernel(*[part[None]] * tensors, end, -8, 7, axis)
        for part, end in zip(parts, ends, strict=True)
    ]
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty_like", lambda _: y)
        kernel(*[x] * tensors, scale, -8, 7, axis)
    for result, wanted in zip(results, expected, strict=True):
        assert_same_bits(result[None], wanted)


# ------------------------------------------------------------------------------- memory stays flat


@linux_memory
@pytest.mark.parametrize(("shape", "times"), [((1, 64), 5000), ((1, 70001), 1000)])
def test_calls_leave_memory_flat(shape, times, with_threads):
    x, scale = torch.randn(shape).requires_grad_(), torch.tensor(0.1)

    def call():
        y, observed = fused_observer.observe(x)
        loss = fake_quant(y, scale).sum() + observed.ratio.sum()
        torch.autograd.grad(loss, x)

    with_threads(2)
    assert growth(call, times) < 2 << 20


# --------------------------------------------------------- the edges of vectors, pieces and chunks

EDGES = [1, 2, *range(15, 18), *range(255, 258), *range(1023, 1026), *range(2047, 2050)]
EDGES += [*range(4095, 4098), *range(16383, 16386), *range(65535, 65538), *range(131071, 131074)]


def hard_rows(size):
    """Yield rows in float64 whose sums or maxima are hard: drifts, jumps and lone outliers."""
    at = torch.arange(size, dtype=torch.float64)
    noise = torch.randn_like(at)
    lone = torch.zeros(size, dtype=torch.float64)
    lone[2 * size // 3] = 1
    yield noise
    yield 1e4 + noise
    yield 1e4 + at % 2  # a deviation of a half
    yield noise + 1e4 * (at % 16384 < 256)  # few elements of a chunk are elsewhere
    yield noise + 1e4 * (at % 16384 >= 256)
    yield noise + 1e3 * (at // 2048)
    yield 1e4 + at / size
    yield noise + 1e6 * lone
    yield -1e4 + noise - 1e8 * lone
    yield noise + lone * 1e30


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [*EDGES, 1000003])
def test_hard_rows_are_within_the_gates(size, dtype):
    if size == 1000003 and dtype != torch.float32:
        size = 200003
    widest = torch.finfo(dtype).max / 2
    units = (1.0, 1e30, 1e-30) if dtype in (torch.float32, torch.bfloat16) else (1.0,)
    for row in hard_rows(size):
        for unit in units:
            x = (row * unit).clamp(-widest, widest).to(dtype)
            columns = statistics(x[None])[0].tolist()
            expected = reference.outlier_statistics(x[None], 1, False)[0].tolist()
            assert [columns[i] for i in EXACT_COLUMNS] == [expected[i] for i in EXACT_COLUMNS]
            mean, deviation, ratio = extended_statistics(x, columns[MEDIAN])
            gate, ratio_gate = gates(dtype, mean, deviation)
            # a mean near zero is what is left of numbers as large as the deviation
            rest = (2.0**-53 if dtype == torch.float64 else 2.0**-24) * deviation
            assert abs(columns[MEAN] - mean) <= gate * abs(mean) + rest
            assert abs(columns[DEVIATION] - deviation) <= gate * deviation
            assert abs(columns[RATIO] - ratio) <= ratio_gate * ratio


@pytest.mark.parametrize("size", [3, 255, 1025, 16385, 65537])
@pytest.mark.parametrize("unit", [1e30, 1e-30])
def test_adversarial_rows_of_huge_and_tiny_numbers(size, unit):
    x = (adversarial_rows(size, torch.float32).double() * unit).float()
    for row, columns in zip(x, statistics(x).tolist(), strict=True):
        mean, deviation, ratio = extended_statistics(row, columns[MEDIAN])
        gate, ratio_gate = gates(torch.float32, mean, deviation)
        assert abs(columns[MEAN] - mean) <= gate * abs(mean)
        assert abs(columns[DEVIATION] - deviation) <= gate * deviation
        assert abs(columns[RATIO] - ratio) <= ratio_gate * ratio


@pytest.mark.parametrize("dtype", DTYPES)
def test_constants_at_the_edges(dtype):
    # float64 has nothing wider for its squares
    largest = -1e150 if dtype == torch.float64 else -torch.finfo(dtype).max
    for size in EDGES:
        for value in (0.1, -65504.0, torch.finfo(dtype).tiny, largest):
            x = torch.full((1, size), value, dtype=dtype)
            columns = statistics(x)[0].tolist()
            number = x[0, 0].item()
            sampled = len(sample_positions(size))
            assert columns == [abs(number), abs(number), number, 0, 0, size, sampled]


# ------------------------------------------------------------------------------ order statistics

VECTORS, LANES = 64, 16  # of csrc/glimpse.h: what is looked at before a row is read


def glimpsed(size):
    """Return the positions of a row that tell where its mean and median may be."""
    if size < 4 * VECTORS * LANES:
        return torch.arange(size)
    part = size // VECTORS
    starts = [i * LANES + hashed_position(i, part - LANES) for i in range(VECTORS)]
    return (torch.tensor(starts)[:, None] + torch.arange(LANES)).flatten()


def orders(size):
    """Yield rows with many ties, in many orders, and rows whose first look misleads."""
    at, noise = torch.arange(size), torch.randn(size)
    yield "sorted", noise.sort().values
    yield "reversed", noise.sort(descending=True).values
    yield "period 36", (at % 36).float() - 7
    yield "period 64", torch.randn(64)[at % 64]
    yield "two values", torch.where(torch.rand(size) < 0.5, 1.5, -2.5)
    yield "nearly all of two", torch.where(at == size // 2, 1e9, 3e-9)
    yield "all equal", torch.full((size,), -0.3)
    yield "zeros", torch.zeros(size) * noise.sign()
    yield "many zeros", noise.relu()
    yield "six in ten are zero", noise * (at % 10 > 5)
    yield "few values", (noise * 3).round()
    yield "alternating", (1 + at).float() * (1 - 2 * (at % 2))
    yield "every exponent", torch.exp2((at * 7919 % 250).float() - 125)
    yield "smallest and largest", torch.where(at % 2 == 0, 1e-45, 3e38)
    for name, value in (("far above", 1e6), ("far below", 1e-6), ("zero", 0.0), ("one", 1.0)):
        misled = noise.clone()
        misled[glimpsed(size)] = value
        yield f"glimpse {name}", misled
    ramp = at.float() + 1
    ramp[glimpsed(size)] = torch.linspace(size * 0.9, size, len(glimpsed(size)))
    yield "glimpse at the top of a ramp", ramp
    half = torch.where(at % 5 < 3, 1.0, 2.0)
    half[glimpsed(size)] = 2.0
    yield "glimpse at the rarer of two values", half


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "size", [1000, 2049, 4095, 4096, 4097, 16385, 65536, 65537, 131073, 200000]
)
def test_medians_of_structured_rows(size, dtype, exact):
    for name, row in orders(size):
        x = row.to(dtype).nan_to_num(posinf=torch.finfo(dtype).max)[None]
        magnitude = x[0].abs() if exact else x[0, sample_positions(size)].abs()
        middle = magnitude.double().numpy()
        middle = np.partition(middle, (len(middle) - 1) // 2)[(len(middle) - 1) // 2]
        columns = statistics(x, exact)[0]
        assert columns[MEDIAN] == middle, name
        assert columns[MEDIAN_COUNT] == (magnitude == middle).sum(), name
        assert columns[MAXIMUM] == x.abs().max(), name
        assert columns[MAXIMUM_COUNT] == (x.abs() == x.abs().max()).sum(), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_medians_of_more_row_sizes_than_are_kept(dtype):
    data = torch.randn(19 * 65536).to(dtype)
    sizes = [stride * 65536 - stride // 2 for stride in range(2, 20)]
    for size in 2 * sizes:
        magnitude = data[sample_positions(size)].abs()
        columns = statistics(data[None, :size])[0]
        assert columns[MEDIAN] == magnitude.median()
        assert columns[MEDIAN_COUNT] == (magnitude == magnitude.median()).sum()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_structured_rows_with_a_bad_value_have_no_statistics(dtype, bad):
    for size in (4096, 65537, 131073):
        for exact in (False, True):
            for _, row in orders(size):
                row[size // 3] = bad
                assert statistics(row.to(dtype)[None], exact).isnan().all()


# --------------------------------------------------------------------------- every instruction set

# optimised less, for the compiler takes longer than the test: bits do not depend on it
VARIANTS = {
    "portable": "-DQUANTTUNE_PORTABLE -O1",
    "AVX2": "-DQUANTTUNE_PORTABLE -march=x86-64-v3 -O1",
}


@functools.cache
def variant(name):
    """Build the extension for one instruction set and without dispatch, and load it."""
    if not (ROOT / "setup.py").exists():
        pytest.skip("the sources of the extension are not here")
    for module in ("setuptools", "pybind11", "ninja"):
        pytest.importorskip(module, reason="building the extension takes it")
    base = ROOT / "build" / name.lower()
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", base, "--build-lib", base]
    flags = {**os.environ, "QUANTTUNE_CXXFLAGS": VARIANTS[name]}
    done = subprocess.run(
        command, cwd=ROOT, env=flags, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    (file,) = (base / "quanttune").glob("_C.*.so")
    loader = importlib.machinery.ExtensionFileLoader("_C", str(file))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("_C", loader))
    loader.exec_module(module)
    return module


@pytest.mark.skipif(SANITIZED, reason="a sanitizer would slow the compiler down")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", VARIANTS)
def test_every_instruction_set_gives_the_same_bits(name, dtype, monkeypatch):
    if name == "AVX2" and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("this machine has no AVX2")
    other = variant(name)
    special = torch.tensor([0.0, -0.0, torch.nan, torch.inf, -torch.inf, 1e-45, -1e-40, 3e38])
    for size in (1, 7, 16, 31, 1025, 4096, 16385, 70001, 131073):
        smooth = torch.randn(3, size)
        inputs = [smooth, smooth * 1e30, smooth * 1e-30, 1e4 + smooth, (smooth * 4).round()]
        inputs += [smooth.relu(), special.repeat(3, size // 8 + 1), torch.zeros(3, size)]
        inputs += [row[None] for _, row in orders(size)] if size > 2000 else []
        for x in (x.to(dtype) for x in inputs):
            with monkeypatch.context() as patch:
                expected = every_op(x, len(x))
                patch.setattr(cpu, "_C", other)
                for actual, wanted in zip(every_op(x, len(x)), expected, strict=True):
                    assert_same_bits(actual, wanted)
