"""Write a dynamic quantized model as tensors of torchao, which compute products of integers."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..quantization.coverage import PRESETS
from ..quantization.modules import QuantizedLinear
from ..quantization.state import quantizers, state_of
from .compressed_formats import IntQuantized, codes_and_scale
from .compressed_tensors import (
    empty_folder,
    float_tensors,
    left_in_float,
    quantized_linears,
    save_config,
)
from .requirements import check_constant


class _Int8(IntQuantized):
    """Codes of 8 bits, and inputs that take their range from themselves."""

    widths = (8,)
    content = "torchao's tensors have the inputs and weights of Linear modules alone, at 8 bits"


def export_torchao(model: Any, folder: str | Path) -> None:
    """Write a dynamic quantized model to a folder of torchao's Int8Tensor weights.

    A model of transformers is loaded by `from_pretrained(folder)` where torchao is installed. Of
    others the folder has model.safetensors alone, whose tensors
    torchao.prototype.safetensors.safetensors_support.unflatten_tensor_state_dict makes:
    docs/deployment.md. Codes of weights are those of the simulation. Inputs are rounded by torchao
    with a scale for each token, in steps of its largest magnitude / 127.5, where the simulation
    takes one range for all, / 127.

    Args:
        model: quantized to 8 bits with `calibrator="dynamic"`, `coverage="linear_inputs"`: each
            Linear in whole, weight and input, or not at all.
        folder: new, or empty.

    Raises:
        ValueError: the model has constant scales, is quantized otherwise, or keeps a prefix.
        FileExistsError: the folder holds something. ModuleNotFoundError: torchao is missing.

    Source: torchao 0.18, Int8DynamicActivationInt8WeightConfig.
    """
    check_constant(model, or_dynamic=True)
    constant = [site for site, one in quantizers(model).items() if not one.dynamic]
    if constant or not quantizers(model):
        raise ValueError(
            f"{(constant or [type(model).__name__])[0]} takes no range from each tensor, as "
            'torchao does: quantize with calibrator="dynamic", coverage="linear_inputs", or take '
            "export_torch or export_compressed_tensors"
        )
    scheme = state_of(model).scheme
    if scheme.kinds != PRESETS["linear_inputs"]:  # a dynamic model may not have met its other sites
        raise ValueError(
            f'coverage must be "linear_inputs", got {scheme.coverage!r}: {_Int8.content}'
        )
    linears = dict(quantized_linears(model, _Int8()))
    for name, linear in linears.items():
        if linear.weight_quantizer.granularity == "group":
            raise ValueError(f'{name} has groups of weights: quantize with weights="channel"')
    state = float_tensors(model)
    try:
        from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

        state |= {f"{name}.weight": _int8_tensor(linear) for name, linear in linears.items()}
    except ImportError as error:
        raise ModuleNotFoundError(f'{error}: pip install "torchao>=0.18"') from error
    from safetensors.torch import save_file

    tensors, metadata = flatten_tensor_state_dict(state)
    folder = empty_folder(folder)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata | {"format": "pt"})
    _write_config(model, linears, folder)


def _int8_tensor(linear: QuantizedLinear) -> Tensor:
    """Return the weight of a Linear as torchao holds it: codes, and scales of outputs."""
    from torchao.quantization import PerRow
    from torchao.quantization.quantize_.workflows.int8.int8_tensor import (
        Int8Tensor,
        QuantizeTensorToInt8Kwargs,
    )

    codes, scale = codes_and_scale(linear)
    rows = scale.expand(len(codes)).reshape(-1, 1) if scale.dim() == 1 else scale
    made: Tensor = Int8Tensor(
        codes,
        rows.contiguous().cpu(),
        [1, codes.shape[1]],
        linear.weight.dtype,
        zero_point=torch.zeros_like(rows, dtype=torch.int8).cpu(),
        act_quant_kwargs=QuantizeTensorToInt8Kwargs(granularity=PerRow()),
    )
    return made


def _write_config(model: Any, linears: dict[str, QuantizedLinear], folder: Path) -> None:
    """Write what `from_pretrained` reads, last; nothing of a model that has no such thing."""
    try:
        from transformers import PreTrainedModel, TorchAoConfig
    except ModuleNotFoundError:
        return
    if not isinstance(model, PreTrainedModel):
        return
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    kept = left_in_float(model, linears)
    found = TorchAoConfig(Int8DynamicActivationInt8WeightConfig(), modules_to_not_convert=kept)
    save_config(model, json.loads(json.dumps(found.to_dict())), folder)
