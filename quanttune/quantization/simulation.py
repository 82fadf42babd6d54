"""Turn a float model into one that computes on integer grids, simulated in floating point."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .calibrators import Calibrator
from .functional import FunctionalSites
from .quantizer import ActivationQuantizer, WeightQuantizer
from .scheme import Scheme
from .twins import QuantizedConv2d, QuantizedEmbedding, Twin, twin_of


def quantize(
    model: nn.Module,
    bits: int = 8,
    *,
    calibrator: str | Callable[[], Calibrator] = "minmax",
    coverage: str = "full_no_softmax",
    weights: str = "channel",
    residual: bool = True,
    data: Iterable[Any] | None = None,
) -> nn.Module:
    """Quantize a model in place to symmetric uniform integers, and return it.

    There is one scale per activation. Linear, Conv1D, Conv2d and Embedding modules become their
    quantized twins, under the same names and with the same parameters; attention's products and
    residual sums are reached while the model runs. The ranges of activations come from one pass of
    `data` in evaluation mode.

    Args:
        model: a float model; `copy.deepcopy` it first to keep it.
        bits: of weights and activations, 2 to 16.
        calibrator: "minmax", "percentile" (99.9 % of the magnitudes), a function that makes a
            `Calibrator`, or "dynamic", which needs no data and can be trained through (each
            activation takes its range from itself, gradients pass straight through).
        coverage: a preset of quanttune.quantization.coverage; `residual=False` leaves the residual
            stream in float.
        weights: "channel", one scale per output channel, or "tensor". Biases stay float.
        data: batches of inputs: tensors, mappings (passed as keywords), or tuples and lists such as
            (inputs, labels), whose first element is taken.

    Raises:
        ValueError: an argument is out of range, `data` is missing or empty, an activation is not
            finite, the model has nothing to quantize or is quantized already.
    """
    scheme = Scheme(bits, calibrator, coverage, weights, residual)
    if any(isinstance(module, (Twin, ActivationQuantizer)) for module in model.modules()):
        raise ValueError(f"{type(model).__name__} is quantized already")
    if data is None and not scheme.dynamic:
        raise ValueError(f"calibrator={calibrator!r} needs data, an iterable of input batches")
    with ExitStack() as undo:  # an error leaves the model as it was
        functional = _swap_modules(model, scheme, undo)
        if data is not None and not scheme.dynamic:
            _calibrate(model, data)
            _freeze(model)
            functional.frozen = True
        undo.pop_all()
    return model


def requantize(model: nn.Module, bits: int, weights: str) -> None:
    """Give a quantized model another width and granularity of weights, but keep its ranges.

    What minmax and percentile cover does not depend on the width, so one calibration serves all.
    """
    scheme = Scheme(bits, weights=weights)
    for quantizer in quantizers(model).values():
        quantizer.set_bits(bits)
    for module in model.modules():
        if isinstance(module, Twin):
            module.weight_quantizer = scheme.weight_quantizer(module.output_axis)


def quantizers(model: nn.Module) -> dict[str, ActivationQuantizer]:
    """Return the quantizers of a quantized model's activations by site: they hold the scales."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, ActivationQuantizer)
    }


def forward_batch(model: nn.Module, batch: Any) -> Any:
    """Call a model with a batch: a tensor, a mapping of keywords, or (inputs, ...)."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch[0] if isinstance(batch, (tuple, list)) else batch)


@torch.no_grad()
def forward_batches(model: nn.Module, data: Iterable[Any]) -> int:
    """Run a model over batches in evaluation mode, for its hooks; return how many there were."""
    was_training = model.training
    model.eval()
    batches = 0
    try:
        for batch in data:
            forward_batch(model, batch)
            batches += 1
    finally:
        model.train(was_training)
    return batches


def _swap_modules(model: nn.Module, scheme: Scheme, undo: ExitStack) -> FunctionalSites:
    device = next(chain(model.parameters(), model.buffers()), torch.empty(0)).device
    modules = [(module, _covered_twin(module, scheme)) for module in model.modules()]
    if not any(twin for _, twin in modules):
        raise ValueError(f"{type(model).__name__} has no Linear, Conv1D, Conv2d or Embedding")
    undo.callback(_drop_quantizers, model)
    # before the twins, whose quantizers are none of its sites
    functional = FunctionalSites(model, scheme, device, undo)
    for module, twin in modules:
        if twin:
            undo.callback(setattr, module, "__class__", type(module))
            _become(module, twin, scheme, device)
        elif isinstance(module, nn.LayerNorm):
            for handle in _wrap_norm(module, scheme, device):
                undo.callback(handle.remove)
    return functional


def _covered_twin(module: nn.Module, scheme: Scheme) -> Any:
    twin = twin_of(module)
    return None if twin is QuantizedEmbedding and "embedding" not in scheme.kinds else twin


def _become(module: Any, twin: Any, scheme: Scheme, device: torch.device) -> None:
    # in place: whoever holds the module, shares it or ties its weight sees the twin
    module.__class__ = twin
    module.weight_quantizer = scheme.weight_quantizer(twin.output_axis)
    if twin is QuantizedEmbedding:
        return
    kind = "convolution" if twin is QuantizedConv2d else "input"
    for name, covered in (("input_quantizer", kind), ("output_quantizer", "output")):
        has = covered in scheme.kinds
        module.add_module(name, scheme.activation_quantizer(device) if has else nn.Identity())


def _wrap_norm(
    module: nn.Module, scheme: Scheme, device: torch.device
) -> Iterator[RemovableHandle]:
    """Quantize what goes into a LayerNorm (a residual sum) and what comes out of it."""
    if "residual" in scheme.kinds:
        module.input_quantizer = scheme.activation_quantizer(device)
        yield module.register_forward_pre_hook(_quantize_input)
    if "norm" in scheme.kinds:
        module.output_quantizer = scheme.activation_quantizer(device)
        yield module.register_forward_hook(_quantize_output)


def _quantize_input(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (module.input_quantizer(args[0]), *args[1:])


def _quantize_output(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return module.output_quantizer(output)


def _calibrate(model: nn.Module, data: Iterable[Any]) -> None:
    _enable_weights(model, False)
    if not forward_batches(model, data):
        raise ValueError("data is empty: calibration needs at least one batch of inputs")
    _enable_weights(model, True)


def _drop_quantizers(model: nn.Module) -> None:
    ours = (ActivationQuantizer, WeightQuantizer, nn.Identity)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if name.endswith("_quantizer") and isinstance(child, ours):
                delattr(module, name)


def _enable_weights(model: nn.Module, enabled: bool) -> None:
    for module in model.modules():
        if isinstance(module, WeightQuantizer):
            module.enabled = enabled


def _freeze(model: nn.Module) -> None:
    sites = quantizers(model)
    for name, quantizer in sites.items():
        quantizer.freeze(name)
    unreached = [name for name, quantizer in sites.items() if not quantizer.reached]
    if unreached:
        warnings.warn(
            f"{len(unreached)} site(s) were not reached during calibration and are not quantized: "
            f"{', '.join(unreached[:5])}. Their modules may be used without being called",
            stacklevel=3,
        )
