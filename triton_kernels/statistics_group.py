"""The last stage of the outlier statistics: merge partial sums, select medians, for many tensors.

The stage before (`outlier_statistics.py`) leaves, for every tensor, partial sums, the median's
sample and an entry in a table that tells where they are. The table is written on the device, so
that no host memory is read: a CUDA graph can hold the whole step.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from quanttune import reference

from ._columns import COLUMNS, DEVIATION, MAXIMUM, MAXIMUM_COUNT, MEAN, MEDIAN, MEDIAN_COUNT, RATIO
from ._launch import on_device_of, options
from ._math import magnitude_of_bits
from ._partials import PARTIALS, merge_partials
from ._selection import median_bits
from .sampling import load_range, strata, unit_of

MERGE_THREADS = 1024
REGISTER_SAMPLE = 65536  # values whose keys fit the registers of one program
MERGE_BLOCK = 8192
MOST_SITES = 256  # of one launch
MOST_PENDING = 2**28  # bytes of samples that wait for it

_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}

# an entry of the table; its width keeps entries on boundaries of 16 bytes, as Triton assumes
_SAMPLE, _PARTIALS, _STATISTICS, _RANGES = (tl.constexpr(index) for index in range(4))
_SAMPLES, _SIZE, _PARTS, _PART_SIZE, _STRIDE, _PITCH = (
    tl.constexpr(index) for index in range(4, 10)
)
_ENTRY = tl.constexpr(16)


class Rows(NamedTuple):
    """What the stage before fills for the rows of one tensor, and how they are split."""

    statistics: Tensor
    sample: Tensor
    partials: Tensor
    entry: Tensor
    size: int
    parts: int
    part_size: int
    stride: int
    sample_size: int
    pitch: int  # of the sample

    @property
    def buffers(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What a kernel is given, in the order of all."""
        return self.sample, self.partials, self.statistics, self.entry


@triton.jit
def leave_entry(
    entry_ptr,
    sample_ptr,
    partial_ptr,
    statistics_ptr,
    ranges_ptr,
    samples,
    size,
    parts,
    part_size,
    stride,
    sample_pitch,
):
    """Tell the merge where everything is."""
    tl.store(entry_ptr + _SAMPLE, sample_ptr.to(tl.int64))
    tl.store(entry_ptr + _PARTIALS, partial_ptr.to(tl.int64))
    tl.store(entry_ptr + _STATISTICS, statistics_ptr.to(tl.int64))
    if ranges_ptr is None:
        tl.store(entry_ptr + _RANGES, tl.cast(0, tl.int64))
    else:
        tl.store(entry_ptr + _RANGES, ranges_ptr.to(tl.int64))
    tl.store(entry_ptr + _SAMPLES, tl.cast(samples, tl.int64))
    tl.store(entry_ptr + _SIZE, tl.cast(size, tl.int64))
    tl.store(entry_ptr + _PARTS, tl.cast(parts, tl.int64))
    tl.store(entry_ptr + _PART_SIZE, tl.cast(part_size, tl.int64))
    tl.store(entry_ptr + _STRIDE, tl.cast(stride, tl.int64))
    tl.store(entry_ptr + _PITCH, tl.cast(sample_pitch, tl.int64))


@triton.jit
def _merge_kernel(
    table_ptr,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    RANGED: tl.constexpr,
    PARTS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    entry_ptr = table_ptr + tl.program_id(1) * _ENTRY
    if row >= tl.load(entry_ptr + _SAMPLES):
        return
    size = tl.load(entry_ptr + _SIZE).to(tl.int32)
    stride = tl.load(entry_ptr + _STRIDE).to(tl.int32)
    sample_ptr = tl.load(entry_ptr + _SAMPLE).to(tl.pointer_type(DTYPE))
    sample_row_ptr = sample_ptr + row * tl.load(entry_ptr + _PITCH)
    if RANGED:
        ranges_ptr = tl.load(entry_ptr + _RANGES).to(tl.pointer_type(tl.int64))
        begin, size = load_range(ranges_ptr, row, size, stride, 1)
        # a whole row is its own sample; of any other it was gathered from the range
        sample_row_ptr += tl.where(stride == 1, begin, 0)
    # the selection first: it needs all registers there are
    sample_size = size // stride
    if ALIGNED:
        sample_row_ptr = tl.multiple_of(sample_row_ptr, 16)
    bits, median_count = median_bits(sample_row_ptr, sample_size, HALF, BLOCK, ALIGNED)
    median = magnitude_of_bits(bits, DTYPE)

    parts = tl.load(entry_ptr + _PARTS).to(tl.int32)
    part_size = tl.load(entry_ptr + _PART_SIZE).to(tl.int32)
    partial_ptr = tl.load(entry_ptr + _PARTIALS).to(tl.pointer_type(tl.float32))
    mean, deviation, maximum, maximum_count = merge_partials(
        partial_ptr + row * PARTIALS * parts, size, parts, part_size, PARTS
    )
    spread = maximum.to(tl.float64) - median.to(tl.float64)
    ratio = tl.where(deviation == 0.0, 0.0, spread / tl.where(deviation == 0.0, 1.0, deviation))

    # the sums know of NaN and inf, which the maximum and the median may have passed over
    spoiled = tl.where(deviation - deviation == 0.0, 0.0, float("nan")).to(tl.float32)
    statistics_ptr = tl.load(entry_ptr + _STATISTICS).to(tl.pointer_type(tl.float32))
    row_ptr = statistics_ptr + row * COLUMNS
    some = size > 0  # else a row of padding, which has zeros
    tl.store(row_ptr + MAXIMUM, tl.where(some, maximum, 0.0) + spoiled)
    tl.store(row_ptr + MEDIAN, tl.where(some, median, 0.0) + spoiled)
    tl.store(row_ptr + MEAN, mean.to(tl.float32) + spoiled)
    tl.store(row_ptr + DEVIATION, deviation.to(tl.float32) + spoiled)
    tl.store(row_ptr + RATIO, ratio.to(tl.float32) + spoiled)
    tl.store(row_ptr + MAXIMUM_COUNT, tl.where(some, maximum_count, 0).to(tl.float32) + spoiled)
    tl.store(row_ptr + MEDIAN_COUNT, tl.where(some, median_count, 0).to(tl.float32) + spoiled)


class _Variant(NamedTuple):
    """What one compiled merge kernel is for."""

    device: torch.device
    dtype: torch.dtype
    aligned: bool
    ranged: bool
    parts: int
    half: int


@dataclass
class _Pending:
    """The tensors of one variant that wait for their merge, kept alive until it is launched."""

    table: Tensor
    rows: list[Rows] = field(default_factory=list)
    size: int = 0  # of their samples, in bytes


class StatisticsGroup:
    """The outlier statistics of many tensors, which are there once `finish` has been called.

    Merging a site of a model keeps as many multiprocessors busy as the batch has samples, for
    about as long as reading a tensor of 40 MB takes; all sites together fill the GPU.
    """

    def __init__(self) -> None:
        self._pending: dict[_Variant, _Pending] = {}

    def reserve(
        self,
        x: Tensor,
        samples: int,
        exact: bool,
        parts: int,
        part_size: int,
        ranges: Tensor | None = None,
    ) -> Rows:
        """Return room for the statistics of a tensor, all of which the caller fills but
        `statistics`.
        """
        # before it is there: what has been reserved must be filled when it is merged
        for variant, pending in list(self._pending.items()):
            if len(pending.rows) == MOST_SITES or pending.size >= MOST_PENDING:
                _launch(variant, self._pending.pop(variant))
        size = x.numel() // samples
        stride, sample_size = strata(size, exact)
        # a whole row is its own sample; of any other it is gathered, on 32-byte boundaries
        pitch = size if stride == 1 else triton.cdiv(sample_size, 16) * 16
        sample = x if stride == 1 else x.new_empty(samples * pitch)
        # a whole row is read from where its range begins
        unit = 16 if ranges is None or stride > 1 else unit_of(x)
        aligned = pitch % 16 == unit % 16 == 0 and sample.data_ptr() % 16 == 0
        pending = self._pending_like(sample, aligned, ranges is not None, parts, sample_size)
        rows = Rows(
            x.new_empty((samples, reference.COLUMNS), dtype=torch.float32),
            sample,
            x.new_empty((samples, PARTIALS.value, parts), dtype=torch.float32),
            pending.table[len(pending.rows)],
            size,
            parts,
            part_size,
            stride,
            sample_size,
            pitch,
        )
        pending.rows.append(rows)
        pending.size += sample.nbytes if stride > 1 else 0
        return rows

    def finish(self) -> None:
        """Merge what has been reserved since the last call."""
        for variant, pending in self._pending.items():
            _launch(variant, pending)
        self._pending.clear()

    def _pending_like(
        self, sample: Tensor, aligned: bool, ranged: bool, parts: int, sample_size: int
    ) -> _Pending:
        half = max(triton.next_power_of_2(sample_size) // 2, 64)
        variant = _Variant(
            sample.device,
            sample.dtype,
            aligned,
            ranged,
            max(triton.next_power_of_2(parts), 16),
            half if sample_size <= REGISTER_SAMPLE else 0,
        )
        if variant not in self._pending:
            table = sample.new_empty((MOST_SITES, _ENTRY.value), dtype=torch.int64)
            self._pending[variant] = _Pending(table)
        return self._pending[variant]


def _launch(variant: _Variant, pending: _Pending) -> None:
    most_samples = max(len(rows.statistics) for rows in pending.rows)
    with on_device_of(pending.table):
        _merge_kernel[(most_samples, len(pending.rows))](
            pending.table,
            DTYPE=_TYPES[variant.dtype],
            ALIGNED=variant.aligned,
            RANGED=variant.ranged,
            PARTS=variant.parts,
            HALF=variant.half,
            BLOCK=MERGE_BLOCK,
            **options(MERGE_THREADS),
        )
