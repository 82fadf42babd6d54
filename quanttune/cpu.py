"""The C++ kernels behind the signatures of reference/. ops.py hands over dense CPU tensors."""

import ctypes
import math
from typing import Any

import torch
from torch import Tensor

import quanttune._C as _C

from . import reference

_TYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
_OPENMP = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")


def share_openmp(extension: Any) -> bool:
    """Hand a build of the extension, which links no OpenMP, the runtime that torch runs on.

    That is the one whose names the whole process sees, as torch's loader and LD_PRELOAD make them,
    or else what torch's own libraries are linked to. Without one the kernels keep to one thread.
    """
    for path in (None, torch._C.__file__):
        library = ctypes.CDLL(path)
        if all(hasattr(library, name) for name in _OPENMP):
            functions = (ctypes.cast(getattr(library, name), ctypes.c_void_p) for name in _OPENMP)
            extension.set_openmp(*(function.value for function in functions))
            return True
    return False


HAS_OPENMP = share_openmp(_C)


def fake_quant(
    x: Tensor, scale: Tensor, qmin: int, qmax: int, axis: int | None, out: Tensor | None = None
) -> Tensor:
    y = _new(x) if out is None else out
    _C.fake_quant(
        x.data_ptr(), scale.data_ptr(), y.data_ptr(), _TYPES[x.dtype], *_channels(x, axis),
        qmin, qmax, torch.get_num_threads(),
    )  # fmt: skip
    return y


def dynamic_fake_quant(x: Tensor, qmin: int, qmax: int, axis: int | None) -> Tensor:
    y = _new(x)
    _C.dynamic_fake_quant(
        x.data_ptr(), y.data_ptr(), _TYPES[x.dtype], *_channels(x, axis), qmin, qmax,
        torch.get_num_threads(),
    )  # fmt: skip
    return y


def fake_quant_backward(
    grad: Tensor, x: Tensor, scale: Tensor, qmin: int, qmax: int, axis: int | None
) -> Tensor:
    grad_x = _new(grad)
    _C.fake_quant_backward(
        grad.data_ptr(), x.data_ptr(), scale.data_ptr(), grad_x.data_ptr(), _TYPES[x.dtype],
        *_channels(x, axis), qmin, qmax, torch.get_num_threads(),
    )  # fmt: skip
    return grad_x


def learned_fake_quant_backward(
    grad: Tensor, x: Tensor, scale: Tensor, qmin: int, qmax: int, axis: int | None
) -> tuple[Tensor, Tensor]:
    grad_x, grad_scale = _new(grad), torch.empty_like(scale)
    _C.learned_fake_quant_backward(
        grad.data_ptr(), x.data_ptr(), scale.data_ptr(), grad_x.data_ptr(), grad_scale.data_ptr(),
        _TYPES[x.dtype], *_channels(x, axis), qmin, qmax, torch.get_num_threads(),
    )  # fmt: skip
    return grad_x, grad_scale


def dynamic_fake_quant_backward(
    grad: Tensor, x: Tensor, qmin: int, qmax: int, axis: int | None
) -> Tensor:
    grad_x = _new(grad)
    _C.dynamic_fake_quant_backward(
        grad.data_ptr(), x.data_ptr(), grad_x.data_ptr(), _TYPES[x.dtype], *_channels(x, axis),
        qmin, qmax, torch.get_num_threads(),
    )  # fmt: skip
    return grad_x


def round_again(
    grad: Tensor, x: Tensor, scale: Tensor | None, qmin: int, qmax: int, slope: bool
) -> tuple[Tensor, float | Tensor]:
    y = _new(x)
    total = _C.round_again(
        grad.data_ptr(), x.data_ptr(), 0 if scale is None else scale.data_ptr(), y.data_ptr(),
        _TYPES[x.dtype], slope, x.numel(), qmin, qmax, torch.get_num_threads(),
    )  # fmt: skip
    return y, total


def outlier_statistics(
    x: Tensor, samples: int, exact: bool, ranges: Tensor | None = None
) -> Tensor:
    statistics = torch.empty((samples, reference.COLUMNS), dtype=reference.result_dtype(x))
    if samples:
        _C.outlier_statistics(
            x.data_ptr(), statistics.data_ptr(), _TYPES[x.dtype], samples, x.numel() // samples,
            exact, _address_of_ranges(ranges, samples), torch.get_num_threads(),
        )  # fmt: skip
    return statistics


def outlier_statistics_backward(
    grad: Tensor,
    x: Tensor,
    statistics: Tensor,
    ratio_grad: Tensor,
    exact: bool,
    detach_deviation: bool,
    ranges: Tensor | None = None,
) -> Tensor:
    grad_x = _new(grad)
    if x.numel():
        ratio_grad = ratio_grad.to(statistics.dtype).contiguous()
        _C.outlier_statistics_backward(
            grad.data_ptr(), x.data_ptr(), statistics.data_ptr(), ratio_grad.data_ptr(),
            grad_x.data_ptr(), _TYPES[x.dtype], len(statistics), x.numel() // len(statistics),
            exact, detach_deviation, _address_of_ranges(ranges, len(statistics)),
            torch.get_num_threads(),
        )  # fmt: skip
    return grad_x


def quantization_errors(x: Tensor, steps: Tensor, qmin: int, qmax: int) -> Tensor:
    errors = torch.empty(steps.shape, dtype=torch.float64)
    _C.quantization_errors(
        x.data_ptr(), steps.data_ptr(), errors.data_ptr(), _TYPES[x.dtype], x.numel(), len(steps),
        qmin, qmax, torch.get_num_threads(),
    )  # fmt: skip
    return errors


def magnitude_histogram(x: Tensor, width: float, bins: int) -> Tensor:
    counts = torch.empty(bins, dtype=torch.int64)
    _C.magnitude_histogram(
        x.data_ptr(), counts.data_ptr(), _TYPES[x.dtype], x.numel(), width, bins,
        torch.get_num_threads(),
    )  # fmt: skip
    return counts


def _address_of_ranges(ranges: Tensor | None, samples: int) -> int:
    if ranges is None:
        return 0
    if ranges.dtype != torch.int64 or ranges.shape != (samples, 2):
        got = f"{ranges.dtype} of shape {tuple(ranges.shape)}"
        raise ValueError(f"ranges must be int64 of shape ({samples}, 2), got {got}")
    return ranges.data_ptr()


def _new(x: Tensor) -> Tensor:
    """Make room for a result, and ask for large pages above malloc's largest mmap threshold."""
    y = torch.empty_like(x)
    if y.nbytes >= 2**25:
        _C.prefer_large_pages(y.data_ptr(), y.nbytes)
    return y


def _channels(x: Tensor, axis: int | None) -> tuple[int, int, int]:
    """View x as (outer, channels, inner), with one step per channel."""
    if axis is None:
        return 1, 1, x.numel()
    return math.prod(x.shape[:axis]), x.shape[axis], math.prod(x.shape[axis + 1 :])
