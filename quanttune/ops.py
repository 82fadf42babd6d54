"""The ops: one schema each, one kernel per kind of device, gradients on top.

A call goes fused_observer.observe (checks) -> _Observe (gradient) ->
torch.ops.quanttune.outlier_statistics (device) -> the kernel. While a model is tuned: Tap ->
loss.measure -> StatisticsGroup, whose kernels leave their last stage to one launch for all.

The ops are functional: they neither change nor return what they are given. The one exception has a
name that ends in an underscore.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference
from .reference import range_search


class Backend(NamedTuple):
    """Which implementation serves a kind of device, and why."""

    name: str
    reason: str


def _load_cpu() -> tuple[Any, Backend]:
    try:
        from . import cpu
    except ImportError as error:
        reason = f"the C++ extension does not load: {error}"
        advice = "CPU tensors take the slower PyTorch reference. `quanttune doctor` has the remedy."
        warnings.warn(f"{reason}. {advice}", stacklevel=2)
        return reference, Backend("reference", reason)
    limit = "" if cpu.HAS_OPENMP else "; one thread, since this PyTorch has no OpenMP"
    return cpu, Backend("C++", f"the extension is built{limit}")


def _load_gpu() -> tuple[Any, Backend]:
    try:
        import quanttune.triton_kernels as gpu
    except ImportError as error:
        reason = f"Triton does not load: {error}"
        if torch.version.cuda or torch.version.hip:  # elsewhere nobody misses it
            advice = "GPU tensors take the slower PyTorch reference. pip install triton mends it."
            warnings.warn(f"{reason}. {advice}", stacklevel=2)
        return reference, Backend("reference", reason)
    return gpu, Backend("Triton", "Triton is installed")


_cpu, _cpu_backend = _load_cpu()
_gpu, _gpu_backend = _load_gpu()


def backends() -> dict[str, Backend]:
    """Tell which implementation serves which kind of device, and why."""
    others = Backend("reference", "no kernels for other devices")
    return {"cpu": _cpu_backend, "cuda": _gpu_backend, "other": others}


def _register(
    name: str, arguments: str, fake: Callable[..., Any], outputs: int = 1
) -> Callable[..., Any]:
    """Define torch.ops.quanttune.<name>, for every kind of device."""
    op = f"quanttune::{name}"
    returns = "Tensor" if outputs == 1 else f"({', '.join(['Tensor'] * outputs)})"
    torch.library.define(op, f"({arguments}) -> {returns}", tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(op, "CompositeExplicitAutograd")(_kernel(reference, name))
    torch.library.impl(op, "CPU")(_dense(_kernel(_cpu, name)))
    torch.library.impl(op, "CUDA")(_dense(_kernel(_gpu, name)))
    torch.library.register_fake(op)(fake)
    return getattr(torch.ops.quanttune, name).default


def _kernel(module: Any, name: str) -> Callable[..., Any]:
    """Return a module's function of that name; what it lacks, the reference composes."""
    return next(getattr(m, name) for m in (module, reference, range_search) if hasattr(m, name))  # type: ignore[no-any-return]


def _dense(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Hand contiguous tensors to the kernel: sample positions count along the logical order."""

    def call(*arguments: Any) -> Any:
        return kernel(*_contiguous(arguments))

    return call


def _contiguous(arguments: Sequence[Any]) -> list[Any]:
    return [a.contiguous() if isinstance(a, Tensor) else a for a in arguments]


def _register_in_place(name: str) -> Callable[..., None]:
    """Define torch.ops.quanttune.<name>_, which writes what <name> returns over x."""
    op = f"quanttune::{name}_"
    arguments = "Tensor(a!) x, Tensor scale, int qmin, int qmax, int? axis"
    torch.library.define(op, f"({arguments}) -> ()", tags=(torch.Tag.pt2_compliant_tag,))
    for key, module in (("CompositeExplicitAutograd", reference), ("CPU", _cpu), ("CUDA", _gpu)):
        torch.library.impl(op, key)(_in_place(getattr(module, name)))
    torch.library.register_fake(op)(lambda *arguments: None)
    return getattr(torch.ops.quanttune, f"{name}_").default


def _in_place(kernel: Callable[..., Tensor]) -> Callable[..., None]:
    def call(x: Tensor, scale: Tensor, *grid: Any) -> None:
        if x.is_contiguous():
            kernel(x, scale.contiguous(), *grid, out=x)
        else:
            x.copy_(kernel(x.contiguous(), scale.contiguous(), *grid))
        if not x.is_inference():
            torch.autograd.graph.increment_version(x)  # whoever saved x for a backward is told

    return call


def _dense_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_statistics(x: Tensor, samples: int, exact: bool, ranges: Tensor | None = None) -> Tensor:
    return x.new_empty((samples, reference.COLUMNS), dtype=reference.result_dtype(x))


fake_quant = _register(
    "fake_quant",
    "Tensor x, Tensor scale, int qmin, int qmax, int? axis",
    fake=lambda x, scale, qmin, qmax, axis: _dense_like(x),
)
fake_quant_ = _register_in_place("fake_quant")
dynamic_fake_quant = _register(
    "dynamic_fake_quant",
    "Tensor x, int qmin, int qmax, int? axis",
    fake=lambda x, qmin, qmax, axis: _dense_like(x),
)
fake_quant_backward = _register(
    "fake_quant_backward",
    "Tensor grad, Tensor x, Tensor scale, int qmin, int qmax, int? axis",
    fake=lambda grad, x, scale, qmin, qmax, axis: _dense_like(grad),
)
learned_fake_quant_backward = _register(
    "learned_fake_quant_backward",
    "Tensor grad, Tensor x, Tensor scale, int qmin, int qmax, int? axis",
    fake=lambda grad, x, scale, qmin, qmax, axis: (_dense_like(grad), _dense_like(scale)),
    outputs=2,
)
dynamic_fake_quant_backward = _register(
    "dynamic_fake_quant_backward",
    "Tensor grad, Tensor x, int qmin, int qmax, int? axis",
    fake=lambda grad, *others: _dense_like(grad),
)
outlier_statistics = _register(
    "outlier_statistics",
    "Tensor x, SymInt samples, bool exact, Tensor? ranges=None",
    fake=_fake_statistics,
)
outlier_statistics_backward = _register(
    "outlier_statistics_backward",
    "Tensor grad, Tensor x, Tensor statistics, Tensor ratio_grad, bool exact, "
    "bool detach_deviation, Tensor? ranges=None",
    fake=lambda grad, *others: _dense_like(grad),
)


def round_again(grad: Tensor, x: Tensor, *grid: Any) -> tuple[Tensor, float | Tensor]:
    """Do what reference.round_again does. No op: only backwards call it, which nobody traces."""
    kernels = _cpu if x.device.type == "cpu" else reference
    return kernels.round_again(grad, x.contiguous(), *grid)  # type: ignore[no-any-return]


class StatisticsGroup:
    """The outlier statistics of many tensors. They are there once `finish` has been called: what a
    GPU does last, it does for all of them in one launch.
    """

    def __init__(self) -> None:
        self._on_gpu = None if _gpu is reference else _gpu.StatisticsGroup()

    def outlier_statistics(self, x: Tensor, *arguments: Any) -> Tensor:
        if self._on_gpu is None or not _is_plain_gpu_tensor(x):
            return outlier_statistics(x, *arguments)  # type: ignore[no-any-return]
        options = _contiguous((x, *arguments))
        return _gpu.outlier_statistics(*options, group=self._on_gpu)  # type: ignore[no-any-return]

    def finish(self) -> None:
        if self._on_gpu is not None:
            self._on_gpu.finish()


def _is_plain_gpu_tensor(x: Tensor) -> bool:
    return x.is_cuda and type(x) is Tensor


quantization_errors = _register(
    "quantization_errors",
    "Tensor x, Tensor steps, int qmin, int qmax",
    fake=lambda x, steps, qmin, qmax: steps.new_empty(
        steps.shape, dtype=reference.accumulator_dtype(x)
    ),
)
magnitude_histogram = _register(
    "magnitude_histogram",
    "Tensor x, float width, int bins",
    fake=lambda x, width, bins: x.new_empty(bins, dtype=torch.int64),
)
