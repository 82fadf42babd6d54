"""What can be exported, and where to; said before anything is traced."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..batches import arguments_of
from ..quantization.channel_grids import NoisyQuantizer
from ..quantization.correction import corrections
from ..quantization.other_grid import OtherGrid
from ..quantization.other_grids import refuse_other_grids
from ..quantization.outliers import outliers_in
from ..quantization.quantizer import ActivationQuantizer
from ..quantization.row_quantizers import GroupQuantizer
from ..quantization.state import quantizers, state_of, weight_quantizers
from ..quantization.value_grids import UnsignedQuantizer
from ..tuning.hooks import is_attached
from .dimensions import Dynamic, axes_of
from .integer_weights import MAX_INTEGER_BITS

# grids that a file has as one scale, with a zero point or what is around it
IN_ONNX = (NoisyQuantizer, UnsignedQuantizer)
IN_PROGRAMS = (UnsignedQuantizer,)
TARGETS = ("inductor", "executorch", "litert")
OPSETS = {"uint8": range(18, 22), "int8": range(18, 21)}  # that ONNX Runtime 1.31 loads
# who runs ONNX files of which types of codes, its own first: docs/deployment.md has what was seen
RUNTIMES = {
    "onnxruntime": ("uint8", "int8"),
    "onnxruntime-cpu": ("uint8", "int8"),
    "onnxruntime-web": ("uint8", "int8"),
    "opencv": ("uint8",),
    "openvino": ("int8",),
    "tensorrt": ("int8",),
    "tract": ("int8",),
}
_ON_PHONES = "for phones there are ONNX Runtime, and export_torch for executorch and litert"
_OTHERS = {
    **dict.fromkeys(TARGETS, "it takes a program of PyTorch: call export_torch (Python)"),
    "torchao": "it takes a folder: call export_torchao (--format torchao)",
    "vllm": "it takes a folder: call export_compressed_tensors (--format compressed-tensors)",
    "ncnn": f"its converter, pnnx 20261020, crashes on such files; {_ON_PHONES}",
    "mnn": f"version 3.6.1 makes a file without outputs of them; {_ON_PHONES}",
    "onnx2torch": "version 1.5.15 has no DequantizeLinear; export_torch makes a program of PyTorch",
}


def check_example(
    example: Any, dynamic: Dynamic, model: nn.Module
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of the model's forward, if a file can be made of them."""
    args, kwargs = arguments_of(example, model)
    for given, x in (*(("", x) for x in args), *kwargs.items()):
        if not isinstance(x, Tensor):
            raise TypeError(f"example_inputs must be tensors, got {type(x).__name__}")
        for axis, name in axes_of(given, dynamic).items():
            if axis < x.dim() and x.shape[axis] < 2:
                raise ValueError(
                    f"dimension {axis} ({name}) of example_inputs must be 2 or more, got "
                    f"{x.shape[axis]}: else the file would take no other size"
                )
    return args, kwargs


def check_path(path: Path, is_folder: bool = False) -> None:
    """Refuse a path that no file can have, or no folder of files."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} to write {path.name} to")
    if is_folder and (path.suffix == ".onnx" or (path.exists() and not path.is_dir())):
        raise NotADirectoryError(f"path must be a folder, for two files, got the file {path}")
    if path.is_dir() and not is_folder:
        raise IsADirectoryError(f"path must be a file, and {path} is a folder")


def codes_for(target: str, act_dtype: str | None, opset: int) -> str:
    """Return the type of codes for a runtime; refuse what it would not run."""
    if target in _OTHERS:
        raise ValueError(f"no ONNX file is written for {target}: {_OTHERS[target]}")
    if target not in RUNTIMES:
        raise ValueError(f"target must be one of {', '.join(RUNTIMES)}, got {target!r}")
    types = RUNTIMES[target]
    if act_dtype is not None and act_dtype not in types:
        raise ValueError(f"act_dtype must be {' or '.join(types)} for {target}, got {act_dtype!r}")
    known = OPSETS[act_dtype or types[0]]
    if opset not in known:
        raise ValueError(
            f"opset must be from {known[0]} to {known[-1]} with {act_dtype or types[0]} "
            f"activations, got {opset}"
        )
    return act_dtype or types[0]


def check_target(
    target: str, dynamic: Mapping[int, str] | None, sites: Mapping[str, ActivationQuantizer]
) -> None:
    """Refuse a target that is unknown, or that could not run what it would get."""
    if target not in TARGETS:
        raise ValueError(f"target must be one of {', '.join(TARGETS)}, got {target!r}")
    if target == "inductor":
        return
    if dynamic:
        raise ValueError(
            f"dynamic must be empty for {target}, got {dict(dynamic)}: what has other sizes than "
            "the example would not become integers"
        )
    if others := [site for site, one in sites.items() if one.bits != MAX_INTEGER_BITS]:
        raise ValueError(
            f"{target} rounds to 8 bits, whatever a program says, and {others[0]} has "
            f"{sites[others[0]].bits}"
        )
    softmax = [site for site, one in sites.items() if one.kind == "probability"]
    if target == "litert" and softmax:
        raise ValueError(
            f"LiteRT rounds a softmax to steps of 1/256 only, and {softmax[0]} has others: "
            "quantize with coverage 'full_no_softmax'"
        )


def check_model(model: nn.Module, grids: tuple[type[OtherGrid], ...] = ()) -> None:
    """Refuse a model without constant scales, not in float32, or with groups of weights.

    grids: those of other_grids.py that a file has.
    """
    check_constant(model, grids)
    for site, (_, quantizer) in weight_quantizers(model).items():
        if isinstance(quantizer, GroupQuantizer):
            raise ValueError(
                f"{site} has groups of {quantizer.size} inputs, which only "
                'export_compressed_tensors writes: quantize with weights="channel"'
            )


def check_constant(
    model: nn.Module, grids: tuple[type[OtherGrid], ...] = (), or_dynamic: bool = False
) -> None:
    """Refuse a model without constant scales, with grids of others, or not in float32.

    or_dynamic: let ranges pass that are taken from each tensor.
    """
    state_of(model)
    name = type(model).__name__
    if is_attached(model):
        raise ValueError(f"{name} is being tuned: detach() its tuner first")
    refuse_other_grids(model, "writes uniform integers only", grids)
    sites = quantizers(model)
    weights = {site: weight for site, (_, weight) in weight_quantizers(model).items()}
    if any(quantizer.learned_by is not None for quantizer in (*sites.values(), *weights.values())):
        raise ValueError(f"the scales of {name} are being learned: call freeze_scales first")
    if corrected := corrections(model):
        raise ValueError(
            f"{next(iter(corrected))} adds a product of floats to its own (qera), which no file "
            "says: quantize with another method"
        )
    if kept := outliers_in(model):
        raise ValueError(
            f"{next(iter(kept))} keeps weights in float among its codes (gwq, prequant), which no "
            "file says: quantize with another method"
        )
    if not or_dynamic and any(quantizer.dynamic for quantizer in sites.values()):
        raise ValueError(
            f"{name} takes ranges from each tensor: quantize it with data, and a calibrator "
            'other than "dynamic"'
        )
    if wrong := [n for n, p in model.named_parameters() if p.dtype != torch.float32]:
        raise ValueError(f"{name} must be float32: {wrong[0]} is not, call model.float()")
