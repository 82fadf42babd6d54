"""Write a quantized model of transformers in the format that vLLM and transformers load."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..quantization.modules import QuantizedLinear
from ..quantization.prefixes.kept_prefix import prefix_of
from ..quantization.quantizer import ActivationQuantizer
from ..quantization.restoration import described_restorations
from ..quantization.state import quantizers, weight_quantizers
from .compressed_formats import Format, IntQuantized, PackQuantized
from .requirements import check_constant


def export_compressed_tensors(model: Any, folder: str | Path) -> None:
    """Write a quantized model of transformers as a folder of compressed-tensors.

    `AutoModel....from_pretrained(folder)` loads it where `compressed-tensors` is installed; it is
    the format of vLLM, which was not tried. Codes are those of the simulation; config.json comes
    last, so that a folder which has one is whole. The tokenizer is not written:
    `tokenizer.save_pretrained(folder)`.

    Args:
        model: quantized to 8 bits with `coverage="linear_inputs"`: each Linear in whole, weight and
            input, or not at all. With zero points a runtime may round exact ties to the other side.
            Or with `coverage="weight_only"`, to 8 bits at most, which are packed.
        folder: new, or empty.

    Raises:
        ValueError: the model is none of transformers, or is quantized otherwise than the format
            can say, or keeps a prefix. FileExistsError: the folder holds something.

    Source: compressed-tensors 0.20.1, formats "int-quantized" and "pack-quantized".
    """
    from huggingface_hub import save_torch_state_dict
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"model must be one of transformers, got {type(model).__name__}")
    check_constant(model)
    form: Format = IntQuantized() if quantizers(model) else PackQuantized()
    linears = dict(quantized_linears(model, form))
    if not linears:
        raise ValueError(f"no Linear module of {type(model).__name__} is rounded: {form.content}")
    folder = empty_folder(folder)
    tensors = float_tensors(model)
    for name, linear in linears.items():
        del tensors[f"{name}.weight"]
        tensors |= {f"{name}.{key}": tensor for key, tensor in form.tensors(linear).items()}
    save_torch_state_dict(tensors, folder, metadata={"format": "pt"})
    save_config(model, _described(model, linears, form), folder)


def empty_folder(path: str | Path) -> Path:
    """Return a folder that is made if there is none.

    Raises:
        FileExistsError: it holds something.
    """
    folder = Path(path)
    folder.mkdir(exist_ok=True)
    if any(folder.iterdir()):
        raise FileExistsError(f"{folder} holds something already: choose another folder")
    return folder


def save_config(model: Any, quantization: dict[str, Any], folder: Path) -> None:
    """Write what `from_pretrained` reads of a model of transformers, beside its tensors."""
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.quantization_config = quantization
    config.save_pretrained(folder)


def left_in_float(model: nn.Module, linears: dict[str, QuantizedLinear]) -> list[str]:
    """Return the names of the Linear modules that are not rounded."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [name for name in names if name not in linears]


def quantized_linears(model: nn.Module, form: Format) -> Iterator[tuple[str, QuantizedLinear]]:
    """Yield the Linear modules that are rounded in whole; refuse what else is rounded."""
    if prefix_of(model):
        raise ValueError(f"{type(model).__name__} keeps a prefix, which the format cannot say")
    if restored := described_restorations(model):
        raise ValueError(
            f"{next(iter(restored))} is followed by a multiplication of channels, which the format "
            "cannot say: leave out smooth_inputs, and equalizations where it is named"
        )
    weights = {name: quantizer for name, (_, quantizer) in weight_quantizers(model).items()}
    found = weights | quantizers(model)
    modules = dict(model.named_modules())
    for name, module in modules.items():
        sites = {f"{name}.{site}" for site in form.sites}
        if not isinstance(module, QuantizedLinear) or not sites & set(found):
            continue
        if missing := sites - set(found):
            raise ValueError(
                f"{missing.pop()} stays in float, not the other operand: {form.content}"
            )
        for site in sites:
            quantizer = found.pop(site)
            if quantizer.bits not in form.widths:
                raise ValueError(f"{site} has {quantizer.bits} bits: {form.content}")
            is_unknown = isinstance(quantizer, ActivationQuantizer) and not quantizer.dynamic
            if is_unknown and not quantizer.calibrated:
                raise ValueError(
                    f"{site} was never reached during calibration: give quantize other data, or "
                    f"leave the module in float, by overrides={{{name!r}: None}}"
                )
        _check_untied(name, module, model)
        yield name, module
    if found:
        raise ValueError(
            f"{next(iter(found))} is rounded, and {form.content}: quantize with "
            'coverage="linear_inputs", or "weight_only", and leave the rest in float by overrides'
        )


def _check_untied(name: str, linear: QuantizedLinear, model: nn.Module) -> None:
    for other, module in model.named_modules():
        if module is not linear and getattr(module, "weight", None) is linear.weight:
            raise ValueError(
                f"{name} shares its weight with {other}, which would be stored as integers: leave "
                f"it in float, by overrides={{{name!r}: None}}"
            )


def float_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return what stays as it is; of tensors that are tied the first, as from_pretrained wants."""
    tensors: dict[str, Tensor] = {}
    known: set[tuple[Any, ...]] = set()
    for name, tensor in model.state_dict().items():
        place = tensor.data_ptr(), tensor.shape, tensor.stride()
        if "_quantizer." not in name and (place not in known or not tensor.numel()):
            known.add(place)
            tensors[name] = tensor
    return tensors


def _described(
    model: nn.Module, linears: dict[str, QuantizedLinear], form: Format
) -> dict[str, Any]:
    """Return the quantization_config of a config.json: a group for each width of weights."""
    groups: dict[str, Any] = {}
    for name, linear in linears.items():
        arguments = form.arguments(linear)
        group = groups.setdefault(json.dumps(arguments), {"targets": [], **arguments})
        group["targets"].append(name)
    if len(groups) == 1:
        next(iter(groups.values()))["targets"] = ["Linear"]
    return {
        "quant_method": "compressed-tensors",
        "format": form.name,
        "quantization_status": "compressed",
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups.values())},
        "ignore": left_in_float(model, linears),
    }
