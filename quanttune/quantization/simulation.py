"""Turn a float model into one that computes on integer grids, simulated in floating point."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any

from torch import nn

from ..masks import Mask
from ..progress import Progress, silent
from ..transaction import transaction
from .calibrators import Calibrator
from .convert import convert
from .correction import drop_corrections
from .methods import Method, methods_of
from .placement import check_devices
from .prefixes.decoder import renew_prefix
from .product_counts import counting_products
from .restoration import drop_restorations
from .running import Data, forward_batches, rounding_only
from .saving.hf_config import update_hf_config
from .scheme import Overrides, Scheme, matches
from .state import quantizers, refuse_quantized, state_of
from .summary import warn_of_floats
from .ties import snapshot


def quantize(
    model: nn.Module,
    bits: int = 8,
    *,
    weight_bits: int | None = None,
    calibrator: str | Callable[[], Calibrator] = "minmax",
    coverage: str = "full_no_softmax",
    weights: str | int = "channel",
    residual: bool = True,
    overrides: Overrides | None = None,
    symmetric: bool = True,
    methods: Sequence[str | Method] = (),
    data: Iterable[Any] | None = None,
    mask: Mask | None = "attention_mask",
    progress: Progress = silent,
) -> nn.Module:
    """Quantize a model in place to uniform integers, and return it.

    Grids are symmetric unless told otherwise, and there is one scale per activation. Linear,
    Conv1D, Conv1d to Conv3d, Embedding and MultiheadAttention modules and stacks of experts become
    quantized ones, under the same names and with the same parameters; attention's products
    and residual sums are reached while the model runs. The ranges of activations come from one pass
    of `data` in evaluation mode.

    Args:
        model: a float model; `copy.deepcopy` it first to keep it.
        bits: of activations and weights, 2 to 16.
        weight_bits: of weights, if they have others: 4 with bits=8 is W4A8.
        calibrator: "minmax", "ema", "percentile" (99.9 % of the magnitudes), "percentile_ema",
            "mse", "omse", "kl" (quanttune.quantization.calibrators has the rules), a function that
            makes a `Calibrator`, or "dynamic", which needs no data and can be trained through (each
            activation takes its range from itself, gradients pass straight through).
        coverage: a preset of quanttune.quantization.coverage; `residual=False` leaves the residual
            stream in float.
        weights: "channel", one scale per output channel (of each expert), "tensor", or the size of
            groups, such as 128: so many inputs of an output of a Linear or Conv1D share a scale,
            and other weights have one per channel. Biases stay float.
        overrides: what is quantized otherwise: fnmatch patterns on the names of quantizers
            (`summary` lists them) or of the modules they belong to, with {"bits": ...}, or None to
            leave it in float, such as {"*.fc2": {"bits": 16}, "head": None}. The last match counts.
        symmetric: False gives each activation a zero point: its grid covers from the lowest to the
            highest value, and zero. "percentile" then takes the 0.1th and the 99.9th of the values,
            "omse" is FQ-ViT's; "mse", "kl" and "dynamic" have no such form. Weights stay symmetric.
        methods: what is done to the parameters so that rounding costs less, in this order: names
            in quanttune.quantization.methods, such as "erq", or objects with options, such as
            GPTQ(act_order=True). They read `data` several times.
        data: batches of inputs: tensors, mappings (passed as keywords), or tuples and lists such as
            (inputs, labels), whose first element is taken.
        mask: which tokens of a batch are padding, which no range is taken from: as in `attach`.
        progress: called with what is being done, how many batches, layers or the like are done,
            and of how many, which is None for data without a length.

    Raises:
        ValueError: an argument is out of range, `data` is missing or empty, an activation is not
            finite, the model has nothing to quantize, is quantized already or not on one device, a
            module has a forward of its own on the instance, an override matches nothing, a method
            cannot be applied. TypeError: `bits` is no whole number, or a calibrator of one's own
            has no range(), with symmetric=False.
    """
    equalizations, roundings = methods_of(methods)
    names = tuple(method.name for method in (*equalizations, *roundings))
    options = weight_bits, calibrator, coverage, weights, residual, overrides or {}, symmetric
    scheme = Scheme(bits, *options, names)
    reads = any(method.reads_data for method in (*equalizations, *roundings))
    given = Data(_check_data(data, scheme, reads), mask, progress)
    refuse_quantized(model)
    check_devices(model)
    with transaction(model) as undo:  # an error leaves the model as it was
        if names:
            undo.callback(snapshot(model))
            undo.callback(drop_restorations, model)
            undo.callback(drop_corrections, model)
        for equalization in equalizations:
            equalization.apply(model, scheme, given)
            renew_prefix(model)
        renew_prefix(model)  # also of weights that were trained since
        functional = convert(model, scheme, undo)
        if not scheme.dynamic:
            _calibrate(model, given)
            _check_overrides(model, scheme)
            _freeze(model)
            functional.frozen = True
            warn_of_floats(model)
        for rounding in roundings:
            rounding.apply(model, scheme, given)
        update_hf_config(model)
    return model


def _check_data(data: Iterable[Any] | None, scheme: Scheme, methods_read: bool) -> Iterable[Any]:
    """Return the batches of data; none if a dynamic model is not given any."""
    if data is None and not scheme.dynamic:
        wanted = f"calibrator={scheme.calibrator!r} needs data"
        raise ValueError(f"{wanted}, an iterable of input batches")
    if methods_read and (data is None or iter(data) is data):
        raise ValueError(
            "methods read data several times: they need a list or a DataLoader of input batches, "
            f"got {type(data).__name__}"
        )
    return () if data is None else data


def _calibrate(model: nn.Module, data: Data) -> None:
    batches = iter(data.track("calibrating"))
    with rounding_only(model):
        with counting_products(model) as state_of(model).products:
            first = forward_batches(model, islice(batches, 1), data.mask)
        if not first:
            raise ValueError("data is empty: calibration needs at least one batch of inputs")
        forward_batches(model, batches, data.mask)


def _check_overrides(model: nn.Module, scheme: Scheme) -> None:
    """Refuse a pattern that names no quantizer, not even one that it left in float."""
    names = [name for name, _ in model.named_modules() if name.endswith("_quantizer")]
    for pattern in scheme.overrides:
        if not any(matches(pattern, name) for name in names):
            raise ValueError(
                f"override {pattern!r} matches no quantizer and no module that has one: there are "
                f"{', '.join(names[:3])}, ..."
            )


def _freeze(model: nn.Module) -> None:
    sites = quantizers(model)
    for name, quantizer in sites.items():
        quantizer.freeze(name)
    unreached = [name for name, quantizer in sites.items() if not quantizer.calibrated]
    if unreached:
        warnings.warn(
            f"{len(unreached)} site(s) were not reached during calibration and are not quantized: "
            f"{', '.join(unreached[:5])}. Their modules may be used without being called",
            stacklevel=3,
        )
