"""Write a quantized model to an ONNX file."""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..quantization.saving.description import describe
from ..quantization.saving.safetensors_file import KEY
from ..transaction import transaction
from .dimensions import Dynamic, names_of
from .external_data import write
from .parts import parts_of, traceable
from .requirements import IN_ONNX, check_example, check_model, check_path, codes_for
from .tracing import BATCH, outputs_by_name, traced

_CHECK = torch.ops.aten._assert_scalar.default  # such as that texts hold a token for each patch


def export_onnx(
    model: nn.Module,
    example_inputs: Any,
    path: str | Path,
    *,
    target: str = "onnxruntime",
    act_dtype: str | None = None,
    opset: int = 20,
    dynamic: Mapping[int, str] = BATCH,
    with_past: bool = False,
) -> None:
    """Write a quantized model to an ONNX file, with QuantizeLinear where it rounds.

    Weights are stored as integers, those of Linear modules as (inputs, outputs). The codes of an
    activation are named after its site, such as head.input_quantizer.codes. What is rounded to more
    than 8 bits is computed in float. Sites that make the same codes of the same tensor are one, and
    have the first one's name. Keys and values of caches are no outputs, but with_past. The metadata
    hold the recipe, as `quanttune.save` writes it.

    Where the sizes of two inputs may differ, so do the names: a decoder's second dimension is
    decoder_input_ids_tokens beside the encoder's tokens. What the model's code fixes, such as the
    channels of images beside texts, stays fixed, with a warning.

    Meanwhile no other thread may call a module, of this model or another one: torch.export takes
    all calls of the process for those that it traces, and either may fail.

    Args:
        model: what `quantize` returned, in float32. It is exported in evaluation mode.
        example_inputs: a batch of 2 samples or more, as `quantize` takes it: a tensor, a mapping
            (passed as keywords), or a tuple or list, whose first element is taken.
        path: the file; it is there whole or not at all. Above 2 GB the tensors lie beside it, in
            a file that is named after it and them (.onnx.<digest>.data), and replaced with it. Of
            an encoder-decoder with_past it is a folder, which is made if there is none.
        target: the runtime: "onnxruntime", "onnxruntime-cpu" (products add their bias, by an
            operator of its own), "onnxruntime-web", "opencv", "openvino", "tensorrt" or
            "tract".
        act_dtype: type of the codes, of activations and of the weights that they meet; by default
            the target's own. "uint8" (zero point 128) is ONNX Runtime's, whose products of two
            uint8 are exact on every processor: those of uint8 and int8 saturate on x86 without
            VNNI. "int8" (zero point 0), which rounds once for each product, is what OpenVINO,
            TensorRT and tract multiply; ONNX Runtime too, faster than uint8 where VNNI is.
        opset: version of the operators, 18 to 21; with int8 to 20.
        dynamic: dimensions of all inputs that may have any size, and names for them. For texts of
            any length it is {0: "batch", 1: "tokens"}.
        with_past: for decoders of transformers that generate. Keys and values of earlier tokens are
            inputs past_key_values.N.key and .value (batch, heads, tokens, channels), of length 0
            for a prompt, those of all tokens outputs present.N.key and .value beside logits, as in
            Optimum's files. The other inputs are input_ids, attention_mask of earlier and new
            tokens, and position_ids, if the model has any. A kept prefix is no part of the past.

            An encoder-decoder's are two files in a folder. encoder_model.onnx takes what the model
            reads, of tokens with attention_mask, and returns last_hidden_state.
            decoder_model_merged.onnx takes input_ids, encoder_hidden_states, the tokens'
            encoder_attention_mask and past_key_values.N.decoder.key and .value, .encoder.key and
            .value: without any the first time, then what it returned as present.N.decoder.key and
            so on. Keys and values of encoder_hidden_states are computed where the past has none.
            The example holds decoder_input_ids.

    Raises:
        ValueError: the model is not quantized, being tuned, or not calibrated, or an argument does
            not fit, or the target runs no such files, or the model's code fixes a dimension in all
            inputs, or with_past is not for such a model. OSError: the file cannot be written.
    """
    path = Path(path)
    codes = codes_for(target, act_dtype, opset)
    check_model(model, IN_ONNX)
    if with_past and dynamic is not BATCH:
        raise ValueError(f"dynamic says nothing of a file with_past, got {dict(dynamic)}: leave it")
    parts = parts_of(model) if with_past else (None,)
    check_path(path, is_folder=len(parts) > 1)
    found: dict[Path, Any] = {}
    for part in parts:
        free = part.dimensions if part else dynamic
        with transaction(model), traceable(model, example_inputs, part) as (example, names):
            args, kwargs = check_example(example, free, model)
            program = traced(model, args, kwargs, free, codes)
        file = path / part.file if part else path
        found[file] = _translated(program, target, codes, opset, free, names)
    for file, onnx_model in found.items():
        onnx_model.metadata_props[KEY] = json.dumps(describe(model))
        file.parent.mkdir(exist_ok=True)
        write(onnx_model, file)


def _translated(
    program: torch.export.ExportedProgram,
    target: str,
    act_dtype: str,
    opset: int,
    dynamic: Dynamic,
    input_names: list[str] | None,
) -> Any:
    try:
        import onnxscript

        from .onnx_graph import finish, name_codes
        from .onnx_translations import translations
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f'{error}: pip install "quanttune[deploy]"') from error
    table = translations(getattr(onnxscript, f"opset{opset}"), act_dtype)
    exported = converted(
        program, opset, custom_translation_table=table, optimize=False, input_names=input_names
    )
    name_codes(exported.model.graph)
    with _folding_in_silence():
        exported.optimize()
    finish(exported.model, names_of(exported.model.graph.inputs, dynamic), target, act_dtype)
    return exported.model


def converted(program: torch.export.ExportedProgram, opset: int, **options: Any) -> Any:
    """Return what torch.onnx makes of a program, without the checks of values that it makes."""
    for node in program.graph.find_nodes(op="call_function", target=_CHECK):
        program.graph.erase_node(node)
    program.graph.eliminate_dead_code()
    spec = program.call_spec.out_spec
    names = list(outputs_by_name(pytree.tree_unflatten(range(spec.num_leaves), spec)))
    with _folding_in_silence():
        return torch.onnx.export(
            program, opset_version=opset, output_names=names, verbose=False, **options
        )


@contextmanager
def _folding_in_silence() -> Iterator[None]:
    """Keep onnxscript from telling which nodes it cannot compute: they stay in the file.

    BERT's GatherElements is one (onnx 1.23.2; findings/onnx_gather_elements.sh).
    """
    logger = logging.getLogger("onnxscript.optimizer")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
